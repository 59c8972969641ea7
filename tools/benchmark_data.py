"""Times data loading against plain webdataset; prints samples per second and ratios.

    python tools/benchmark_data.py FOLDER [--sets SET ...] [--workers 2] [--repeats 5] [--mosaicml PYTHON] [--energon PYTHON]
                                   [--litdata PYTHON] [--record NAME]

FOLDER gets three sets, made once: latents with text embeddings (16 x 32 x 32 and 77 x 768, float16), JPEGs of 640 x 480 that become
256 x 256, and JPEGs of 2048 x 1536 that become 512 x 512. All loaders read the same samples with the same decoding and resizing in as
many processes, shuffled, and hand on collated batches; runs are interleaved, files are in the page cache, medians over repeats. ``webdataset_pil`` decodes as
webdataset does by itself (``decode("pilrgb")``: all pixels), and resizes then. Then: the first batch of an epoch, the first after a
restart in its middle, where webdataset has to read what it passes over, and the memory of a loading process. MosaicML streaming,
Megatron-Energon and litdata need environments of their own, whose Pythons are named: see benchmark_other_loaders.py.
"""

import argparse
import io
import itertools
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ledger
import numpy as np
import torch
import webdataset
from benchmark_other_loaders import SAMPLES, SQUARES, as_float32, measure
from PIL import Image, ImageOps
from torch.utils.data import default_collate
from tqdm import tqdm

from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.data.batch import typed_batch
from rmoe_megatron.data.loader import BatchLayout, batches
from rmoe_megatron.data.order import GlobalOrder
from rmoe_megatron.data.shards.bucketing import Bucketing
from rmoe_megatron.data.shards.build_index import open_index
from rmoe_megatron.data.shards.decoding import decode_image
from rmoe_megatron.data.shards.index import LATENTS
from rmoe_megatron.data.shards.writer import open_shard
from rmoe_megatron.data.storage.store import LocalStore
from rmoe_megatron.data.training_dataset import TEXT_HIDDEN_STATES, TEXT_POOLED, SampleFormat, TrainingDataset

SHARDS = 8  # of each set
BATCH = 32
DEPENDS_ON = ("rmoe_megatron/data", "tools/benchmark_data.py", "tools/benchmark_other_loaders.py")


def write_sets(folder: Path, wanted: list[str]) -> dict[str, Path]:
    """Write the sets that are wanted unless they are there."""
    rng = np.random.default_rng(0)
    members: dict[str, Callable[[int], dict[str, Any]]] = {
        "latents": lambda _: {
            LATENTS: rng.standard_normal((16, 32, 32)),
            TEXT_HIDDEN_STATES: rng.standard_normal((77, 768)),
            TEXT_POOLED: rng.standard_normal(768),
            "txt": "a caption",
        },
        "jpegs": lambda number: {"jpg": _jpeg(rng, 640, 480), "txt": f"caption {number}"},
        "large_jpegs": lambda number: {"jpg": _jpeg(rng, 2048, 1536), "txt": f"caption {number}"},
    }
    for name in wanted:
        make, samples = members[name], SAMPLES[name] // SHARDS
        if not (folder / name).is_dir():
            (folder / name).mkdir(parents=True)
            for shard in tqdm(range(SHARDS), desc=f"write {name}", unit="shard"):
                with open_shard(folder / name / f"{shard:06d}.tar") as write:
                    for number in range(samples):
                        write(f"{shard * samples + number:06d}", make(number))
        open_index(LocalStore(folder / name))
    return {name: folder / name for name in wanted}


def _jpeg(rng: np.random.Generator, width: int, height: int) -> bytes:
    """Return a smooth picture with some noise: it takes as many bytes as a photograph."""
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=int)
    noisy = np.clip(smooth + rng.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, format="jpeg", quality=90)
    return buffer.getvalue()


def ours(folder: Path, workers: int, first_draw: int) -> Iterator[Any]:
    """Return this project's batches from a draw on."""
    square = SQUARES.get(folder.name)
    taken = SampleFormat(bucketing=Bucketing((square,)) if square is not None else None)
    dataset = TrainingDataset(folder, taken)
    order = GlobalOrder(len(dataset), shuffle=True, seed=0)
    loaded = batches(dataset, order, BatchLayout(BATCH, BATCH, 0, 1), first_draw, num_workers=workers)
    return map(typed_batch, loaded)


def _decoded(square: Bucket | None, sample: dict[str, Any]) -> dict[str, Any]:
    """Decode a sample as this project does."""
    if square is not None:
        image = torch.from_numpy(decode_image(sample["jpg"], square))
        return {"image": image, "caption": sample["txt"].decode()}
    names = {"latents": LATENTS, "text_hidden_states": TEXT_HIDDEN_STATES, "text_pooled": TEXT_POOLED}
    return {name: torch.from_numpy(np.load(io.BytesIO(sample[member]))) for name, member in names.items()}


def _cut(square: Bucket, sample: dict[str, Any]) -> dict[str, Any]:
    """Cut a picture that webdataset has decoded to its middle square."""
    image = ImageOps.fit(sample["jpg"], (square.width, square.height), Image.Resampling.BICUBIC)
    return {"image": torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()), "caption": sample["txt"]}


def plain_webdataset(folder: Path, workers: int, first_draw: int, by_itself: bool = False) -> Iterator[Any]:
    """Return the batches of webdataset's usual pipeline; what comes before a draw is read and passed over.

    Args:
        by_itself: decode pictures as webdataset does.
    """
    urls = [str(folder / shard.name) for shard in LocalStore(folder).shards()]
    read = webdataset.WebDataset(urls, shardshuffle=SHARDS, nodesplitter=webdataset.single_node_only, seed=0)
    shuffled, square = read.shuffle(1000), SQUARES.get(folder.name)
    if by_itself and square is not None:
        decoded = shuffled.decode("pilrgb").map(partial(_cut, square))
    else:
        decoded = shuffled.map(partial(_decoded, square))
    dataset = decoded.batched(BATCH, collation_fn=default_collate, partial=False)
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=workers).repeat()
    return map(as_float32, itertools.islice(iter(loader), first_draw // BATCH, None))


LOADERS: dict[str, Callable[..., Iterator[Any]]] = {
    "ours": ours,
    "webdataset": plain_webdataset,
    "webdataset_pil": partial(plain_webdataset, by_itself=True),
}
OTHERS = ("mosaicml", "energon", "litdata")


def other(python: str, loader: str, folder: Path, workers: int) -> dict[str, float]:
    """Measure another loader in its own environment."""
    script = Path(__file__).with_name("benchmark_other_loaders.py")
    done = subprocess.run(
        [python, str(script), loader, str(folder.parent), folder.name, "--workers", str(workers)],
        env={**os.environ, "PYTHONPATH": str(script.parents[1])}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def read_into_page_cache(folder: Path) -> None:
    """Read a set and its copies in other formats once: a kernel short of memory may have let go of files since they were written."""
    for path in folder.parent.glob(f"{folder.name}*/**/*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sets", nargs="+", choices=SAMPLES, default=list(SAMPLES))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    for name in OTHERS:
        parser.add_argument(f"--{name}", metavar="PYTHON", help=f"an environment's that has {name}")
    ledger.add_arguments(parser)
    arguments = parser.parse_args()
    sets = write_sets(arguments.folder, arguments.sets)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in tqdm(range(arguments.repeats), desc="measure", unit="repeat"):
        for (set_name, folder), (name, make) in itertools.product(sets.items(), LOADERS.items()):
            if name == "webdataset_pil" and set_name not in SQUARES:
                continue
            read_into_page_cache(folder)
            timed = measure(partial(make, folder), arguments.workers, SAMPLES[set_name])
            found.setdefault((set_name, name), []).append(timed)
        for (set_name, folder), name in itertools.product(sets.items(), OTHERS):
            if (python := getattr(arguments, name)) is not None:
                read_into_page_cache(folder)
                found.setdefault((set_name, name), []).append(other(python, name, folder, arguments.workers))
    medians = {
        key: {name: statistics.median(each[name] for each in runs) for name in runs[0]}
        for key, runs in found.items()
    }
    print(f"{platform.machine()}, torch {torch.__version__}, webdataset {webdataset.__version__}")
    print(
        "| set | loader | samples/s | first batch (s) | resume in mid-epoch (s) | a loading process (MB): its own | with its share |\n"
        "|---|---|---|---|---|---|---|"
    )
    for (set_name, name), values in medians.items():
        print(
            f"| {set_name} | {name} | {values['samples_per_second']:.1f} | {values['first_batch']:.2f} | {values['resume']:.2f} | "
            f"{values['own_mb']:.0f} | {values['shared_mb']:.0f} |"
        )
    for (set_name, name), values in medians.items():
        ratio = medians[set_name, "ours"]["samples_per_second"] / values["samples_per_second"]
        if name != "ours":
            print(f"{set_name}: ours / {name} = {ratio:.2f}")
        figures: dict[str, ledger.Figure] = {
            "set": set_name,
            "loader": name,
            "samples_per_second": values["samples_per_second"],
            "first_batch_seconds": values["first_batch"],
            "resume_seconds": values["resume"],
            "own_mb": values["own_mb"],
            "shared_mb": values["shared_mb"],
            "ours_over_it": ratio,
        }
        ledger.write(arguments, figures, DEPENDS_ON, torch.device("cpu"), f"{set_name}-{name}")


if __name__ == "__main__":
    main()
