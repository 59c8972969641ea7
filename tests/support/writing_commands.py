"""Every command that writes, with small inputs, and what it has made."""

import json
import re
import shutil
import warnings
from pathlib import Path

import torch
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.evaluation.test_comparison import write as write_results
from tests.support.commands import rmoe
from tests.support.judges import save_clip, save_detector
from tests.support.sound_inputs import make_inputs

TRAIN = [
    "training.steps=3", "checkpoint.every=1", "checkpoint.keep_last=2", "data.validation=null", "optimizer.warmup_steps=0",
    "training.sample_every=2", "training.sample_prompts=[a cat]", "logging.tensorboard=false",
]  # fmt: skip

# name -> (what is copied to where the command writes, arguments); everything else is read beside it.
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "data build-shapes": ([], ["data", "build-shapes", "w/out", "--train", "6", "--val", "2"]),
    "data build-mazes": (
        [],
        ["data", "build-mazes", "w/out", "--canvas", "4", "--train-sides", "3", "--train-steps", "4", "--test-sides", "4",
         "--test-steps", "3", "--train", "4", "--val", "2", "--test", "1"],
    ),
    "data pack": ([], ["data", "pack", "pictures", "w/out"]),
    "data check": ([], ["data", "check", "raw", "w/out", "--processes", "1"]),
    "data index": (["raw"], ["data", "index", "w/raw"]),
    "data precompute": ([], ["data", "precompute", "config.yaml", "raw", "w/out"]),
    "data show": ([], ["data", "show", "raw", "--out", "w/page.html", "--processes", "1"]),
    "data show, a draw": ([], ["data", "show", "run", "--draw", "0", "--out", "w/draw.png"]),
    "train": ([], ["train", "config.yaml", "run_dir=w/run", *TRAIN]),
    "train --resume": (["run"], ["train", "--resume", "w/run", *TRAIN]),
    "convert to-hf": ([], ["convert", "to-hf", "run", "w/out", "--remote-code", "--max-shard-size", "40KB"]),
    "convert from-hf": ([], ["convert", "from-hf", "dit", "w/out"]),
    "sample": ([], ["sample", "model", "--prompt", "a cat", "--steps", "1", "--out", "w/out"]),
    "eval shapes": (
        [],
        ["eval", "shapes", "model", "--data", "shapes", "--out", "w/out", "--steps", "1", "--images-per-prompt", "1",
         "--limit", "1"],
    ),
    "eval geneval": (
        [],
        ["eval", "geneval", "model", "--out", "w/out", "--metadata", "prompts.jsonl", "--detector", "detector", "--clip",
         "clip", "--steps", "1", "--images-per-prompt", "2", "--dtype", "fp32"],
    ),
    "eval compare": ([], ["eval", "compare", "scores/a", "scores/b", "--out", "w/out"]),
    "diagnose precision": ([], ["diagnose", "precision", "run", "--out", "w/out", "--batches", "1"]),
}  # fmt: skip
# What differs between two runs that do the same: times, processes, paths.
OF_THE_MOMENT = {"history.jsonl", "curves.png", "run.lock", "manifest.json", ".metadata", "status", "mesh"}


def make_all_inputs(folder: Path) -> None:
    """Write the inputs of all commands, which are given in ``folder`` and write below ``w`` there."""
    make_inputs(folder)
    code, errors = rmoe("data", "build-shapes", str(folder / "shapes"), "--train", "4", "--val", "8")
    assert code == 0, errors
    save_detector(folder / "detector")
    save_clip(folder / "clip")
    prompt = {
        "tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat",
    }  # fmt: skip
    (folder / "prompts.jsonl").write_text(json.dumps(prompt) + "\n")
    for name in "ab":
        write_results(folder / "scores" / name)


def prepare(here: Path, command: str) -> list[str]:
    """Empty the folder in which a command writes but for what it needs there; returns its arguments."""
    copied, arguments = COMMANDS[command]
    shutil.rmtree(here / "w", ignore_errors=True)
    (here / "w").mkdir()
    for name in copied:
        shutil.copytree(here / name, here / "w" / name)
    return arguments


def result(folder: Path) -> dict[str, object]:
    """What a command has made, by name, without what belongs to the moment."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.name in OF_THE_MOMENT or path.suffix == ".distcp":
            found[name] = None
            if path.name == ".metadata" and path.parent.suffix != ".partial":  # which may have lost the rest
                found[f"{path.parent.name} holds"] = tensors_of(path.parent)
        elif path.name == "metrics.jsonl":
            records = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = {record["step"]: record["loss"] for record in records if "loss" in record}
        elif path.name == "config.yaml":
            found[name] = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        else:
            found[name] = path.read_bytes()
    return found


def tensors_of(checkpoint: Path) -> dict[str, bytes]:
    """The tensors of a checkpoint, to the bit; where in its files they lie is of the moment."""
    reader = FileSystemReader(checkpoint)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings(action="ignore"):  # that nothing is distributed
        distributed_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return {name: each.numpy().tobytes() for name, each in tensors.items()}


def leftovers(folder: Path) -> list[str]:
    """Names that only what is unfinished has."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    return [name for name in names if re.search(r"(~[^~]+~\d+\.partial|\.claim|\.void)\b", name)]
