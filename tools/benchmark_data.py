"""Times data loading against plain webdataset; prints samples per second and ratios.

    python tools/benchmark_data.py FOLDER [--workers 2] [--repeats 5] [--mosaicml PYTHON] [--energon PYTHON]

FOLDER gets two sets, made once: latents with text embeddings (16 x 32 x 32 and 77 x 768, float16), and JPEGs of 640 x 480 that become
256 x 256. Both loaders read the same shards with the same decoding and resizing in as many processes, shuffled, and hand on collated
batches; runs are interleaved, medians over repeats. Then: the first batch of an epoch, and the first after a restart in its middle,
where webdataset has to read what it passes over. MosaicML streaming and Megatron-Energon need environments of their own, whose
Pythons are named: see benchmark_other_loaders.py.
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

import numpy as np
import torch
import webdataset
from benchmark_other_loaders import as_float32, measure
from PIL import Image
from torch.utils.data import default_collate
from tqdm import tqdm

from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.data.batch import typed_batch
from rmoe_megatron.data.bucketing import Bucketing
from rmoe_megatron.data.decoding import decode_image
from rmoe_megatron.data.index import LATENTS
from rmoe_megatron.data.indexing import open_index
from rmoe_megatron.data.loader import BatchLayout, batches
from rmoe_megatron.data.order import GlobalOrder
from rmoe_megatron.data.samples import TEXT_HIDDEN_STATES, TEXT_POOLED, SampleFormat, TrainingDataset
from rmoe_megatron.data.shard_writer import open_shard
from rmoe_megatron.data.store import LocalStore

SHARDS, SAMPLES = 8, 256  # of each set, and in each shard
BATCH = 32
SIDE = 256
SQUARE = Bucket(SIDE, SIDE)


def write_sets(folder: Path) -> dict[str, Path]:
    """Write both sets unless they are there."""
    rng = np.random.default_rng(0)
    members: dict[str, Callable[[int], dict[str, Any]]] = {
        "latents": lambda _: {
            LATENTS: rng.standard_normal((16, 32, 32)),
            TEXT_HIDDEN_STATES: rng.standard_normal((77, 768)),
            TEXT_POOLED: rng.standard_normal(768),
            "txt": "a caption",
        },
        "jpegs": lambda number: {"jpg": _jpeg(rng), "txt": f"caption {number}"},
    }
    for name, make in members.items():
        if not (folder / name).is_dir():
            (folder / name).mkdir(parents=True)
            for shard in tqdm(range(SHARDS), desc=f"write {name}", unit="shard"):
                with open_shard(folder / name / f"{shard:06d}.tar") as write:
                    for number in range(SAMPLES):
                        write(f"{shard * SAMPLES + number:06d}", make(number))
        open_index(LocalStore(folder / name))
    return {name: folder / name for name in members}


def _jpeg(rng: np.random.Generator) -> bytes:
    """Return a smooth picture with some noise: it takes as many bytes as a photograph."""
    coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC), dtype=int)
    noisy = np.clip(smooth + rng.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, format="jpeg", quality=90)
    return buffer.getvalue()


def ours(folder: Path, workers: int, first_draw: int) -> Iterator[Any]:
    """Return this project's batches from a draw on."""
    dataset = TrainingDataset(folder, SampleFormat(bucketing=Bucketing((SQUARE,))))
    order = GlobalOrder(len(dataset), shuffle=True, seed=0)
    loaded = batches(dataset, order, BatchLayout(BATCH, BATCH, 0, 1), first_draw, num_workers=workers)
    return map(typed_batch, loaded)


def _decoded(sample: dict[str, Any]) -> dict[str, Any]:
    if "jpg" in sample:
        image = torch.from_numpy(decode_image(sample["jpg"], SQUARE))
        return {"image": image, "caption": sample["txt"].decode()}
    names = {"latents": LATENTS, "text_hidden_states": TEXT_HIDDEN_STATES, "text_pooled": TEXT_POOLED}
    return {name: torch.from_numpy(np.load(io.BytesIO(sample[member]))) for name, member in names.items()}


def plain_webdataset(folder: Path, workers: int, first_draw: int) -> Iterator[Any]:
    """Return the batches of webdataset's usual pipeline; what comes before a draw is read and passed over."""
    urls = [str(folder / shard.name) for shard in LocalStore(folder).shards()]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=SHARDS, nodesplitter=webdataset.single_node_only, seed=0)
        .shuffle(1000)
        .map(_decoded)
        .batched(BATCH, collation_fn=default_collate, partial=False)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=workers).repeat()
    return map(as_float32, itertools.islice(iter(loader), first_draw // BATCH, None))


LOADERS = {"ours": ours, "webdataset": plain_webdataset}
OTHERS = ("mosaicml", "energon")


def other(python: str, loader: str, folder: Path, workers: int) -> dict[str, float]:
    """Measure another loader in its own environment."""
    script = Path(__file__).with_name("benchmark_other_loaders.py")
    done = subprocess.run(
        [python, str(script), loader, str(folder.parent), folder.name, "--workers", str(workers)],
        env={**os.environ, "PYTHONPATH": str(script.parents[1])}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run the benchmark and print its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    for name in OTHERS:
        parser.add_argument(f"--{name}", metavar="PYTHON", help=f"an environment's that has {name}")
    arguments = parser.parse_args()
    sets = write_sets(arguments.folder)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in tqdm(range(arguments.repeats), desc="measure", unit="repeat"):
        for (set_name, folder), (name, make) in itertools.product(sets.items(), LOADERS.items()):
            mine = partial(make, folder)
            found.setdefault((set_name, name), []).append(measure(mine, arguments.workers))
        for (set_name, folder), name in itertools.product(sets.items(), OTHERS):
            if (python := getattr(arguments, name)) is not None:
                found.setdefault((set_name, name), []).append(other(python, name, folder, arguments.workers))
    print(f"{platform.machine()}, torch {torch.__version__}, webdataset {webdataset.__version__}")
    print("| set | loader | samples/s | first batch (s) | resume in mid-epoch (s) |\n|---|---|---|---|---|")
    medians = {
        key: {name: statistics.median(each[name] for each in runs) for name in runs[0]}
        for key, runs in found.items()
    }
    for (set_name, name), values in medians.items():
        print(
            f"| {set_name} | {name} | {values['samples_per_second']:.0f} | {values['first_batch']:.2f} | {values['resume']:.2f} |"
        )
    for set_name in sets:
        ours_rate = medians[set_name, "ours"]["samples_per_second"]
        for (other_set, name), values in medians.items():
            if other_set == set_name and name != "ours":
                print(f"{set_name}: ours / {name} = {ours_rate / values['samples_per_second']:.2f}")


if __name__ == "__main__":
    main()
