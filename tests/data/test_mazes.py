"""The set of mazes: what is drawn, its answers by brute force, its text, and that it is the same each time."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from rmoe_megatron.config.model import EncodersConfig
from rmoe_megatron.data.mazes.build import MazeSettings, build_mazes, make_maze
from rmoe_megatron.data.mazes.grid import Cell, draw, from_text, solve, to_text
from rmoe_megatron.data.mazes.sample import Task, spanning_tree
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.encoders.text import load_text_encoder
from rmoe_megatron.errors import UserError

REGION = MazeSettings()
PATH = MazeSettings(Task.path, 9, (5, 7), 10, (9,), (12, 24, 36))


def walks(open_cells: np.ndarray) -> np.ndarray:
    """Steps between all cells, by powers of the adjacency matrix: int64 [N^2, N^2], a large number where there is no way."""
    side, count = len(open_cells), open_cells.size
    adjacent = np.zeros((count, count), dtype=np.int64)
    for a, b in itertools.product(range(count), repeat=2):
        (ra, ca), (rb, cb) = divmod(a, side), divmod(b, side)
        adjacent[a, b] = abs(ra - rb) + abs(ca - cb) == 1 and open_cells[ra, ca] and open_cells[rb, cb]
    steps = np.where(np.eye(count, dtype=bool), 0, 10**6)
    reached = np.eye(count, dtype=np.int64)
    for number in range(1, count):
        reached = np.minimum(reached @ adjacent, 1)
        steps = np.where((reached > 0) & (steps == 10**6), number, steps)
    return steps


@pytest.mark.parametrize("settings", [REGION, PATH], ids=["region", "path"])
@pytest.mark.parametrize("index", range(6))
def test_answers_are_those_of_brute_force(settings: MazeSettings, index: int) -> None:
    maze = make_maze(settings, 3, "test", index)
    steps, start = walks(maze.cells != Cell.wall), np.flatnonzero(maze.cells == Cell.mark_a)[0]
    if settings.task is Task.region:
        expected = steps[start] < 10**6
        assert maze.answer.steps == steps[start][expected].max()
    else:
        end = np.flatnonzero(maze.cells == Cell.mark_b)[0]
        expected = steps[start] + steps[end] == steps[start, end]
        assert maze.answer.steps == steps[start, end]
    assert (maze.answer.cells.flatten() == expected).all()
    first, last = settings.ranges()[index % len(settings.test_steps)]
    assert first <= maze.answer.steps <= last


def test_mazes_have_one_way_between_any_two_rooms() -> None:
    """A graph is a tree if it is connected and has one edge less than nodes."""
    for seed in range(5):
        cells = spanning_tree(np.random.default_rng(seed), 9)
        free = cells == Cell.free
        edges = (free[:, 1:] & free[:, :-1]).sum() + (free[1:] & free[:-1]).sum()
        assert free[::2, ::2].all()
        assert edges == free.sum() - 1
        start = np.flatnonzero(free)[0]
        assert (walks(free)[start][free.flatten()] < 10**6).all()


def test_text_and_picture_say_the_grid() -> None:
    cells = from_text("A.#/.#./#.B")
    assert cells.tolist() == [[2, 1, 0], [1, 0, 1], [0, 1, 3]]
    assert to_text(cells) == "A.#/.#./#.B"
    with pytest.raises(ValueError, match="does not reach"):
        solve(cells)
    region = from_text("A.#/.#./#..")
    answer = solve(region)
    assert (answer.cells.tolist(), answer.steps) == (
        [[True, True, False], [True, False, False], [False] * 3],
        1,
    )
    picture = draw(region, answer.cells)
    assert picture.shape == (12, 12, 3)
    assert picture[0, 0].tolist() == [0, 128, 0]
    assert picture[3, 7].tolist() == [128, 128, 0]
    assert picture[11, 11].tolist() == [64, 64, 64]
    assert picture[0, 11].tolist() == [0, 0, 0]


@pytest.mark.parametrize("text", ["", "A.", "A./..x", "A./...", "../..", "AA/..", "AB/B."])
def test_text_that_is_no_grid_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no square|has not one A"):
        from_text(text)


def test_several_shortest_ways_are_refused() -> None:
    with pytest.raises(ValueError, match="several"):
        solve(from_text("A./.B"))


def test_sets_are_the_same_each_time_and_their_splits_differ(tmp_path: Path) -> None:
    counts = {"train": 12, "val": 4, "test": 10}
    for name in ("one", "two"):
        build_mazes(tmp_path / name, REGION, counts, seed=5)
    files = [
        path.relative_to(tmp_path / "one") for path in sorted((tmp_path / "one").rglob("*")) if path.is_file()
    ]
    for path in files:
        if path.suffix != ".lock":
            assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes(), path
    sets = {split: ShardDataset(tmp_path / "one" / split, ["png", "txt", "json"]) for split in counts}
    texts = {split: [part[index]["txt"] for index in range(len(part))] for split, part in sets.items()}
    assert {split: len(found) for split, found in texts.items()} == counts
    assert len({text for found in texts.values() for text in found}) == 26
    for split, most_steps, sides in (("train", 8, (5, 6)), ("val", 8, (5, 6)), ("test", 20, (6, 7, 8))):
        for index in range(len(sets[split])):
            sample = sets[split][index]
            cells = from_text(sample["txt"])
            answer = solve(cells)
            assert sample["json"]["steps"] == answer.steps <= most_steps
            assert sample["json"]["side"] in sides
            assert (sample["png"].transpose(1, 2, 0) == draw(cells, answer.cells)).all()
    assert sorted(sets["test"][index]["json"]["steps"] // 4.001 for index in range(10)) == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
    ]


def test_the_encoder_says_of_each_cell_what_and_where_it_is_and_nothing_of_others(tmp_path: Path) -> None:
    settings = MazeSettings(canvas=3, train_sides=(3,), test_sides=(3,), train_steps=8, test_steps=(8,))
    build_mazes(tmp_path / "set", settings, {"train": 1, "val": 0, "test": 1}, seed=0)
    encoder = load_text_encoder(
        EncodersConfig(text_encoder=str(tmp_path / "set" / "encoder")), 10, torch.device("cpu")
    )
    states = encoder.encode(["A../.#./..#", "A../.#./...", "..A/.#./..."]).hidden_states
    assert states.shape == (3, 10, 32)
    torch.testing.assert_close(states[0, :8], states[1, :8])
    assert (states[0, 8] - states[1, 8]).norm() > 1
    # The same cell at another place, and another cell at the same place, are other states; every pair of cells is told apart.
    distances = torch.cdist(states[0, :9], states[0, :9]) + 10 * torch.eye(9)
    assert distances.min() > 0.5
    torch.testing.assert_close(states[1, 9], states[2, 9])
    null = encoder.encode([""])
    assert null.hidden_states[:, 1:].abs().sum() == 0
    assert null.pooled.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "counts", "message"),
    [
        (MazeSettings(canvas=4), {"train": 1, "val": 0, "test": 0}, "canvas"),
        (MazeSettings(task=Task.path), {"train": 1, "val": 0, "test": 0}, "must be odd"),
        (MazeSettings(test_steps=(4, 4)), {"train": 1, "val": 0, "test": 0}, "ranges grow"),
        (REGION, {"train": 0, "val": 0, "test": 0}, "a training sample"),
        (MazeSettings(canvas=5, train_sides=(5,), test_sides=(5,), test_steps=(200, 201)), {"train": 1, "val": 0, "test": 2}, "no region of 201"),
    ],
)  # fmt: skip
def test_sets_that_cannot_be_are_refused(
    settings: MazeSettings, counts: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rmoe_megatron.data.mazes.sample.MOST_TRIES", 20)
    with pytest.raises(UserError, match=message):
        build_mazes(tmp_path / "set", settings, counts, seed=0)
    assert not (tmp_path / "set").exists()
