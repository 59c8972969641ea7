"""Ranks share the making of pictures: the same as of one process, bit for bit, each made once."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rmoe_megatron.cli import main
from rmoe_megatron.data.mazes.build import build_mazes
from rmoe_megatron.data.shapes.build import build_shapes
from rmoe_megatron.inference import generation
from tests.data.test_mazes import REGION
from tests.support.commands import rmoe
from tests.support.sd3_pipeline import save_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    save_pipeline(folder / "sd3")
    build_shapes(folder / "shapes", train=1, val=6, seed=1)
    build_mazes(folder / "mazes", REGION, {"train": 1, "val": 0, "test": 5}, seed=2)
    return folder


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in folder.rglob("*.png")}


SAMPLE = [
    "sample",
    "{folder}/sd3",
    "--prompt",
    "a cat",
    "--prompt",
    "two red circles",
    "--images-per-prompt",
    "3",
    "--batch-size",
    "2",
]
SHAPES = [
    "eval",
    "shapes",
    "{folder}/sd3",
    "--data",
    "{folder}/shapes",
    "--images-per-prompt",
    "2",
    "--batch-size",
    "5",
]
MAZE = ["eval", "mazes", "{folder}/sd3", "--data", "{folder}/mazes", "--batch-size", "2"]
COMMANDS = {
    # The numbers are those of pictures beside one that shows several: a grid, examples, a gallery.
    "sample": ([*SAMPLE, "--steps", "2", "--size", "8x16"], 6),
    "shapes": ([*SHAPES, "--steps", "1"], 14),
    "mazes": ([*MAZE, "--steps", "1,2"], 10),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_two_ranks_make_what_one_makes(name: str, folder: Path) -> None:
    command, count = COMMANDS[name]
    command = [part.format(folder=folder) for part in command]
    results = {}
    for ranks in (1, 2):
        out = folder / f"{name}-{ranks}"
        code, errors = rmoe(*command, "--out", str(out), ranks=ranks)
        assert code == 0, errors
        results[ranks] = out
    one, two = (pictures(results[ranks]) for ranks in (1, 2))
    assert one.keys() == two.keys()
    assert len(one) == count + 1
    for path, image in one.items():
        assert np.array_equal(image, two[path]), path
    assert not list(results[2].rglob("*.claim"))
    if name != "sample":
        said = [json.loads((results[ranks] / "results.json").read_text()) for ranks in (1, 2)]
        assert said[0] == said[1]


def test_a_rank_makes_what_the_other_has_not_made(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 ends after its first batch, which is in the second half; rank 0 makes all the others, and none of them again."""
    command = [part.format(folder=folder) for part in COMMANDS["sample"][0]]
    monkeypatch.setattr("sys.argv", ["rmoe", *command, "--out", str(tmp_path / "out")])
    for key, value in {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(key, value)
    make, made = generation.sample_images, list[str]()

    class EndOfRankError(Exception):
        pass

    def counted(*arguments, **named):
        if len(made) == 2 and is_ending[0]:
            raise EndOfRankError
        made.extend(arguments[1])
        return make(*arguments, **named)

    monkeypatch.setattr(generation, "sample_images", counted)
    is_ending = [True]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(EndOfRankError):
        main()
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["00002.png", "00003.png"]
    is_ending = [False]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit, match="0"):
        main()
    assert len(made) == 6
    assert (tmp_path / "out" / "grid.png").is_file()
    assert np.array_equal(pictures(tmp_path / "out")["grid.png"], pictures(folder / "sample-1")["grid.png"])
