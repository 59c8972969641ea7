"""The judge of mazes on the set's own pictures and on spoilt ones, and the sums of an evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest

from rmoe_megatron.data.mazes.build import MazeSettings, build_mazes, make_maze
from rmoe_megatron.data.mazes.grid import PALETTE, Cell, draw, from_text, solve
from rmoe_megatron.data.mazes.sample import Task
from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.mazes.evaluate import judge, read_set, score, table
from rmoe_megatron.evaluation.mazes.judge import decode, is_right
from tests.data.test_mazes import PATH, REGION


@pytest.mark.parametrize("settings", [REGION, PATH], ids=["region", "path"])
def test_the_judge_is_right_about_every_true_picture_and_sees_every_wrong_cell(
    settings: MazeSettings,
) -> None:
    rng = np.random.default_rng(0)
    for index in range(12):
        maze = make_maze(settings, 1, "test", index)
        picture = draw(maze.cells, maze.answer.cells)
        assert is_right(picture, maze.cells)
        noisy = np.clip(picture + rng.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)
        assert is_right(noisy, maze.cells)
        row, column = rng.integers(settings.canvas, size=2)
        shown = decode(picture, settings.canvas)[row, column]
        other = rng.choice([cell for cell in Cell if cell != shown])
        spoilt = picture.copy()
        spoilt[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = PALETTE[other]
        assert not is_right(spoilt, maze.cells)


def test_decode_takes_pictures_of_any_multiple_of_the_canvas() -> None:
    cells = from_text("A.#/.#./#..")
    expected = [[2, 4, 0], [4, 0, 1], [0, 1, 1]]
    picture = draw(cells, solve(cells).cells)
    assert decode(picture, 3).tolist() == expected
    assert decode(picture.repeat(2, axis=0).repeat(2, axis=1), 3).tolist() == expected
    with pytest.raises(ValueError, match="has no 5 x 5 cells"):
        decode(picture, 5)


@pytest.fixture(scope="module")
def mazes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mazes") / "set"
    build_mazes(out, REGION, {"train": 1, "val": 0, "test": 20}, seed=2)
    return out


def test_results_say_what_was_right_by_steps_of_the_search(mazes: Path) -> None:
    description, grids = read_set(mazes, None)

    def row(depth: int) -> dict:
        """Of a model that is right if the search takes at most 4 steps for each unit of depth."""
        answers = [solve(grid.cells) for grid in grids]
        found = [each.cells if each.steps <= 4 * depth else np.zeros_like(each.cells) for each in answers]
        pictures = np.stack([draw(grid.cells, cells) for grid, cells in zip(grids, found, strict=True)])
        return score(description, grids, judge(pictures, grids))

    by_depth = {depth: row(depth) for depth in (1, 2, 5)}
    # Four grids of each range: 1-4, 5-8, 9-12, 13-16, 17-20.
    assert [by_depth[depth]["exact"] for depth in (1, 2, 5)] == [0.2, 0.4, 1.0]
    errors = [by_depth[depth]["standard_error"] for depth in (1, 2, 5)]
    assert errors == pytest.approx([(0.2 * 0.8 / 20) ** 0.5, (0.4 * 0.6 / 20) ** 0.5, 0.0], rel=0.05)
    assert by_depth[1]["by_steps"] == {
        "1-4": {"exact": 1.0, "grids": 4}, "5-8": {"exact": 0.0, "grids": 4}, "9-12": {"exact": 0.0, "grids": 4},
        "13-16": {"exact": 0.0, "grids": 4}, "17-20": {"exact": 0.0, "grids": 4},
        "longer than trained": {"exact": 0.0, "grids": 12},
    }  # fmt: skip
    assert sum(by_depth[1]["right"]) == 4
    for groups in ("by_side", "by_density"):
        assert sum(group["grids"] for group in by_depth[1][groups].values()) == 20
    shown = table({"rows": [{"sampling_steps": 1, "depth": None, **by_depth[2]}]})
    assert (
        f"| 1 sampling steps, depth as trained | 0.400 ± {errors[1]:.3f} | 1.000 | 1.000 | 0.000 |" in shown
    )


def test_a_set_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"name": "shapes", "train_steps": 1, "test_steps": []}))
    with pytest.raises(UserError, match="holds no mazes"):
        read_set(tmp_path, None)


def test_the_task_of_a_grid_is_said_by_its_marks() -> None:
    """A path has two marks; the set of regions has one."""
    assert (make_maze(PATH, 0, "train", 0).cells == Cell.mark_b).sum() == 1
    assert (make_maze(REGION, 0, "train", 0).cells == Cell.mark_b).sum() == 0
    assert make_maze(PATH, 0, "train", 0).task is Task.path
