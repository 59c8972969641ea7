"""Times MosaicML streaming, Megatron-Energon or litdata on the sets of benchmark_data.py; prints JSON.

    PYTHONPATH=. PYTHON tools/benchmark_other_loaders.py mosaicml|energon|litdata FOLDER SET --workers 2

PYTHON is that of an environment with mosaicml-streaming, megatron-energon or litdata, and with pydantic: they need other libraries than
this project's. Pictures are decoded and resized by this project's function. What each reads is made once: MosaicML's and litdata's own
formats beside the shards, Energon's index of the same shards (with the ``energon`` command of that environment).
"""

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.data.shards.decoding import decode_image

BATCH = 32
SMALLEST_LOADER = 100_000  # kB resident: PyTorch alone takes more
SAMPLES = {"latents": 8 * 256, "jpegs": 8 * 256, "large_jpegs": 8 * 32}  # of each set
SQUARES = {"jpegs": Bucket(256, 256), "large_jpegs": Bucket(512, 512)}
NAMES = {
    "latents": "latents.npy",
    "text_hidden_states": "text_hidden_states.npy",
    "text_pooled": "text_pooled.npy",
}

# Takes workers and the first sample; yields batches.
Make = Callable[[int, int], Iterator[Any]]


def measure(make: Make, workers: int, samples: int) -> dict[str, float]:
    """Time one start, one epoch after it, and one restart in the middle of an epoch, in seconds and samples per second.

    After the epoch a loading process is weighed: the memory that is its own (MB), and with its share of what it has in common with others.

    Args:
        samples: how many samples the set has.
    """
    started = time.perf_counter()
    loaded = make(workers, 0)
    next(loaded)
    first = time.perf_counter()
    count = samples // BATCH
    for _ in range(count):
        next(loaded)
    end = time.perf_counter()
    weights = loading_processes()
    del loaded
    resumed = time.perf_counter()
    next(make(workers, samples // 2))
    return {
        "samples_per_second": count * BATCH / (end - first),
        "first_batch": first - started,
        "resume": time.perf_counter() - resumed,
        "own_mb": statistics.mean(own for own, _ in weights) if weights else 0.0,
        "shared_mb": statistics.mean(shared for _, shared in weights) if weights else 0.0,
    }


def loading_processes() -> list[tuple[float, float]]:
    """Return of every process that this one has started and that loads data: its own memory and its proportional one, in MB (Linux).

    Processes that serve others (a tracker of resources, a server of forks) are smaller than a loader can be, and are left out.
    """
    found = []
    for children in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for child in children.read_text().split():
            try:
                rows = [line.split() for line in Path(f"/proc/{child}/smaps_rollup").read_text().splitlines()]
                kilobytes = {row[0]: int(row[1]) for row in rows if row[-1] == "kB"}
            except (OSError, ValueError):  # it has just ended
                continue
            own = kilobytes["Private_Clean:"] + kilobytes["Private_Dirty:"]
            if kilobytes["Rss:"] > SMALLEST_LOADER:
                found.append((own * 1024 / 1e6, kilobytes["Pss:"] * 1024 / 1e6))
    return found


def as_float32(batch: dict[str, Any]) -> dict[str, Any]:
    """Convert what is float16, in the training process as ours does."""
    return {
        name: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }


def _samples(folder: Path) -> Iterator[dict[str, bytes]]:
    import tarfile

    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = [(member.name, tar.extractfile(member)) for member in tar]
            for _, group in itertools.groupby(members, lambda member: member[0].partition(".")[0]):
                yield {name.partition(".")[2]: file.read() for name, file in group if file is not None}


def mosaicml(folder: Path) -> Make:
    """Return MosaicML's loader over its copy of a set."""
    from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

    copy, is_latents = folder.with_name(f"{folder.name}_mds"), folder.name == "latents"
    if not copy.is_dir():
        shapes = {"latents": "16,32,32", "text_hidden_states": "77,768", "text_pooled": "768"}
        columns = {name: f"ndarray:float16:{shape}" for name, shape in shapes.items()}
        with MDSWriter(
            out=str(copy), columns=columns if is_latents else {"jpg": "bytes", "caption": "str"}
        ) as out:
            for sample in _samples(folder):
                if is_latents:
                    out.write({name: np.load(io.BytesIO(sample[member])) for name, member in NAMES.items()})
                else:
                    out.write({"jpg": sample["jpg"], "caption": sample["txt"].decode()})

    class Decoded(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            if is_latents:
                return {name: torch.from_numpy(sample[name].copy()) for name in NAMES}
            return {
                "image": torch.from_numpy(decode_image(sample["jpg"], SQUARES[folder.name])),
                "caption": sample["caption"],
            }

    def make(workers: int, first: int) -> Iterator[Any]:
        dataset = Decoded(local=str(copy), shuffle=True, shuffle_seed=0, batch_size=BATCH)
        loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, drop_last=True)
        if first:
            state = dataset.state_dict(first, from_beginning=False)
            loader.load_state_dict(state)
        return map(as_float32, itertools.chain.from_iterable(iter(loader) for _ in itertools.count()))

    return make


def energon(folder: Path) -> Make:
    """Return Energon's loader over a set, whose index is made beside the shards."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        WorkerConfig,
        basic_sample_keys,
        get_savable_loader,
        get_train_dataset,
        stateless,
    )

    if not (folder / ".nv-meta" / "dataset.yaml").is_file():
        command = [
            str(Path(sys.executable).with_name("energon")),
            "prepare",
            "--non-interactive",
            "--split-ratio",
            "1,0,0",
        ]
        subprocess.run(
            [*command, "--sample-type", "CrudeWebdataset", str(folder)], check=True, stdout=subprocess.DEVNULL
        )

    @stateless
    def cook(sample: dict[str, Any]) -> Any:
        if folder.name == "latents":
            values = {
                name: torch.from_numpy(np.load(io.BytesIO(sample[member]))) for name, member in NAMES.items()
            }
        else:
            values = {
                "image": torch.from_numpy(decode_image(sample["jpg"], SQUARES[folder.name])),
                "caption": sample["txt"].decode(),
            }
        return {**basic_sample_keys(sample), **values}

    class Encoder(DefaultTaskEncoder):
        cookers = [Cooker(cook)]  # noqa: RUF012
        decoder = None  # the cook decodes

        @stateless
        def batch(self, samples: list[Any]) -> Any:
            names = [name for name in samples[0] if not name.startswith("__")]
            return {
                name: torch.stack([each[name] for each in samples])
                if isinstance(samples[0][name], torch.Tensor)
                else [each[name] for each in samples]
                for name in names
            }

    def build(workers: int) -> Any:
        config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
        dataset = get_train_dataset(
            folder, worker_config=config, batch_size=BATCH, shuffle_buffer_size=1000, max_samples_per_sequence=100,
            task_encoder=Encoder(),
        )  # fmt: skip
        return get_savable_loader(dataset, worker_config=config, watchdog_timeout_seconds=None)

    states: dict[int, Any] = {}

    def make(workers: int, first: int) -> Iterator[Any]:
        loader = build(workers)
        if first:  # a state is what a run would have saved there; the time to make it is not counted
            loader.restore_state_rank(states[first])
        return map(as_float32, iter(loader))

    def saved(workers: int) -> None:
        loader = build(workers)
        half = SAMPLES[folder.name] // 2
        list(itertools.islice(iter(loader), half // BATCH))
        states[half] = loader.save_state_rank()

    make.prepare = saved  # type: ignore[attr-defined]
    return make


def litdata(folder: Path) -> Make:
    """Return litdata's loader over its copy of a set."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.cache import Cache

    copy, is_latents = folder.with_name(f"{folder.name}_litdata"), folder.name == "latents"
    if not copy.is_dir():
        unfinished = copy.with_name(f"{copy.name}.partial")
        cache = Cache(str(unfinished), chunk_bytes="64MB")
        for number, sample in enumerate(_samples(folder)):
            if is_latents:
                cache[number] = {name: np.load(io.BytesIO(sample[member])) for name, member in NAMES.items()}
            else:
                cache[number] = {"jpg": bytes(sample["jpg"]), "caption": sample["txt"].decode()}
        cache.done()
        cache.merge()
        unfinished.rename(copy)

    class Decoded(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            if is_latents:
                return {name: torch.from_numpy(np.array(sample[name])) for name in NAMES}
            return {
                "image": torch.from_numpy(decode_image(sample["jpg"], SQUARES[folder.name])),
                "caption": sample["caption"],
            }

    def build(workers: int) -> Any:
        dataset = Decoded(str(copy), shuffle=True, seed=0, drop_last=True)
        return StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, drop_last=True)

    states: dict[int, Any] = {}

    def make(workers: int, first: int) -> Iterator[Any]:
        loader = build(workers)
        if first:  # a state is what a run would have saved there; the time to make it is not counted
            loader.load_state_dict(states[first])
        return map(as_float32, itertools.chain.from_iterable(iter(loader) for _ in itertools.count()))

    def saved(workers: int) -> None:
        loader, half = build(workers), SAMPLES[folder.name] // 2
        list(itertools.islice(iter(loader), half // BATCH))
        states[half] = loader.state_dict()

    make.prepare = saved  # type: ignore[attr-defined]
    return make


LOADERS = {"mosaicml": mosaicml, "energon": energon, "litdata": litdata}


def main() -> None:
    """Measure one loader on one set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("loader", choices=LOADERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("set", choices=SAMPLES)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    make = LOADERS[arguments.loader](arguments.folder / arguments.set)
    prepare = getattr(make, "prepare", None)
    if prepare is not None:
        prepare(arguments.workers)
    print(json.dumps(measure(make, arguments.workers, SAMPLES[arguments.set])))


if __name__ == "__main__":
    main()
