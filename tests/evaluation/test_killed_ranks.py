"""Two ranks evaluate and are killed while pictures are made, or given ones scored: the same command afterwards gives what an undisturbed rank gives."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import multiprocessing

from rmoe_megatron.data.mazes.build import build_mazes
from rmoe_megatron.data.shapes.build import build_shapes
from rmoe_megatron.evaluation.corebench.evaluate import Settings as CoreBenchSettings
from rmoe_megatron.evaluation.corebench.evaluate import evaluate_corebench
from rmoe_megatron.evaluation.corebench.prompts import read_prompts
from rmoe_megatron.evaluation.dpg.evaluate import Settings as DpgSettings
from rmoe_megatron.evaluation.dpg.evaluate import evaluate_dpg
from rmoe_megatron.evaluation.dpg.questions import read_items
from rmoe_megatron.evaluation.geneval.evaluate import Settings as GenEvalSettings
from rmoe_megatron.evaluation.geneval.evaluate import evaluate_geneval
from rmoe_megatron.evaluation.geneval.prompts import make_prompts
from rmoe_megatron.evaluation.geneval2.evaluate import Settings as GenEval2Settings
from rmoe_megatron.evaluation.geneval2.evaluate import evaluate_geneval2
from rmoe_megatron.evaluation.imagenet.evaluate import Settings as ImageNetSettings
from rmoe_megatron.evaluation.imagenet.evaluate import evaluate_imagenet
from rmoe_megatron.evaluation.mazes.evaluate import Settings as MazesSettings
from rmoe_megatron.evaluation.mazes.evaluate import evaluate_mazes
from rmoe_megatron.evaluation.preference.evaluate import ScorerName, evaluate_preference
from rmoe_megatron.evaluation.preference.evaluate import Settings as PreferenceSettings
from rmoe_megatron.evaluation.rule_set import RuleSet
from rmoe_megatron.evaluation.shapes.evaluate import Settings as ShapesSettings
from rmoe_megatron.evaluation.shapes.evaluate import evaluate_shapes
from rmoe_megatron.inference.generation import Sampling
from tests.data.test_mazes import REGION
from tests.evaluation.test_corebench import save_tables
from tests.evaluation.test_dpg import TABLE
from tests.evaluation.test_imagenet import colours
from tests.evaluation.test_picture_folder import prompts
from tests.hf.test_pipelines import recurrent_dit
from tests.support.judges import save_answerer, save_clip, save_detector
from tests.support.sd3_pipeline import save_pipeline

CONTEXT = multiprocessing.get_context("forkserver")
STEPS, RANKS, TIMEOUT = 12, 2, 120.0


def silent(title: str) -> None:
    return None


def geneval(folder: Path, out: Path, sampling: Sampling) -> None:
    settings = GenEvalSettings(out, 2, detector=str(folder / "detector"), clip=str(folder / "clip"))
    evaluate_geneval(make_prompts()[300:303], sampling, settings, silent)


def geneval2(folder: Path, out: Path, sampling: Sampling) -> None:
    evaluate_geneval2(prompts(6), sampling, GenEval2Settings(out, answerer=str(folder / "answerer")), silent)


def dpg(folder: Path, out: Path, sampling: Sampling) -> None:
    items = read_items(folder / "table.csv", RuleSet.fixed)
    settings = DpgSettings(out, 4, RuleSet.fixed, str(folder / "answerer"))
    evaluate_dpg(items, sampling, settings, silent)


def corebench(folder: Path, out: Path, sampling: Sampling) -> None:
    chosen = read_prompts(folder / "tables")[:3]
    evaluate_corebench(chosen, sampling, CoreBenchSettings(out, 2, answerer=str(folder / "answerer")), silent)


def imagenet(folder: Path, out: Path, sampling: Sampling) -> None:
    settings = ImageNetSettings(out, folder / "reference.npz", folder / "none", 8, num_classes=3)
    evaluate_imagenet(sampling, settings, silent, extract=colours)


def preference(folder: Path, out: Path, sampling: Sampling) -> None:
    models = str(folder / "clip")
    settings = PreferenceSettings(
        folder / "pictures", out, ScorerName.pickscore, folder / "captions.jsonl", models, models
    )
    evaluate_preference(settings, silent)


def shapes(folder: Path, out: Path, sampling: Sampling) -> None:
    evaluate_shapes(sampling, ShapesSettings(folder / "shapes", out, 2))


def mazes(folder: Path, out: Path, sampling: Sampling) -> None:
    evaluate_mazes(sampling, MazesSettings(folder / "mazes", out, (STEPS,)))


BENCHMARKS: dict[str, Callable[[Path, Path, Sampling], None]] = {
    each.__name__: each for each in (geneval, geneval2, dpg, corebench, imagenet, preference, shapes, mazes)
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    save_pipeline(folder / "sd3")
    recurrent_dit(folder / "dit")
    save_detector(folder / "detector")
    save_clip(folder / "clip")
    save_answerer(folder / "answerer", brief=True)
    save_tables(folder / "tables")
    (folder / "table.csv").write_text(TABLE)
    build_shapes(folder / "shapes", train=1, val=6, seed=1)
    build_mazes(folder / "mazes", REGION, {"train": 1, "val": 0, "test": 8}, seed=2)
    (folder / "pictures").mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "pictures" / f"{number}.png")
    lines = [
        json.dumps({"file_name": f"{number}.png", "text": f"a cat {number % 7}"}) for number in range(60)
    ]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "reference.npz", arr_0=images)
    return folder


def evaluate(name: str, rank: int, folder: Path, out: Path) -> None:
    """One rank of an evaluation, in a process of its own."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS), OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="", MASTER_ADDR="127.0.0.1", MASTER_PORT="1",
    )  # fmt: skip
    run(name, folder, out)


def run(name: str, folder: Path, out: Path) -> None:
    model = folder / ("dit" if name == "imagenet" else "sd3")
    BENCHMARKS[name](folder, out, Sampling(str(model), STEPS, 2.0, 0, 1))


@contextlib.contextmanager
def ranks(name: str, folder: Path, out: Path):  # type: ignore[no-untyped-def]
    """The processes of an evaluation, none of which outlives the test."""
    processes = [CONTEXT.Process(target=evaluate, args=(name, rank, folder, out)) for rank in range(RANKS)]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            if process.pid is not None and process.exitcode is None:
                process.kill()
            process.join(10)


def finish(name: str, folder: Path, out: Path) -> None:
    with ranks(name, folder, out) as processes:
        for process in processes:
            process.join(TIMEOUT)
        assert [process.exitcode for process in processes] == [0] * RANKS


def made(name: str, out: Path) -> list[Path]:
    """The pictures that are there, or the scores of pictures that are given; of a grid no more than what it was put together of."""
    folders = ("scores",) if name == "preference" else ("images", "tiles", "parts")
    found = [path for folder in folders for path in (out / folder).rglob("*")]
    return [
        path for path in found if path.suffix in (".png", ".npy", ".json") and path.parent.name != "made_by"
    ]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_two_killed_ranks_left_is_finished_by_the_same_command(
    name: str, folder: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    run(name, folder, whole)  # by one rank, in this process
    deadline = time.monotonic() + TIMEOUT
    with ranks(name, folder, out) as processes:
        while not made(name, out):
            assert time.monotonic() < deadline
            assert all(process.exitcode is None for process in processes), "it ended before it was killed"
            time.sleep(0.002)
        for process in processes:  # the second as a launcher ends what is left
            os.kill(process.pid, signal.SIGKILL)
            process.join(10)
        assert [process.exitcode for process in processes] == [-signal.SIGKILL] * RANKS
    left = {path: path.stat().st_mtime_ns for path in made(name, out)}
    assert 0 < len(left) < len(made(name, whole))  # it was in the middle of it
    assert not (out / "results.json").exists()
    finish(name, folder, out)
    assert {path: path.stat().st_mtime_ns for path in left} == left  # what was made is kept
    for path in sorted(each for each in whole.rglob("*") if each.is_file()):
        other = out / path.relative_to(whole)
        if path.suffix == ".npz":  # its times differ
            with np.load(path) as one, np.load(other) as two:
                assert all((one[key] == two[key]).all() for key in one.files)
        else:
            assert other.read_bytes().replace(bytes(out), bytes(whole)) == path.read_bytes(), other
    assert json.loads((out / "results.json").read_text())["benchmark"]
    assert not list(out.rglob("*.claim"))
