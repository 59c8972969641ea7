"""The comparison of depths: equal FLOPs, what is reused, and what the report says of runs that are there."""

import json
from pathlib import Path

import compare_depths
import pytest
import yaml

from rmoe_megatron.data.mazes.build import MazeSettings, build_mazes
from rmoe_megatron.errors import UserError

GRID = compare_depths.read_grid(Path("configs/grids/mazes_small.yaml"))


def test_arms_train_with_equal_flops_and_the_named_parameters() -> None:
    arms = {arm.name: arm for arm in compare_depths.arms_of(GRID)}
    budget = arms["loop + supervision"].steps * arms["loop + supervision"].flops_per_sample
    assert arms["loop + supervision"].steps == 800
    for arm in arms.values():
        assert arm.steps * arm.flops_per_sample == pytest.approx(budget, rel=1e-2)
    # Looped weights are counted once: the recall is all that they have more than dense.
    assert arms["loop"].parameters == arms["dense"].parameters
    assert arms["loop + supervision"].parameters == arms["dense"].parameters + 2 * 2 * 32 * 32
    assert arms["deeper"].parameters > 2 * arms["dense"].parameters
    # 1 + 4 x 2 + 1 passes of the loop are ten blocks.
    assert arms["loop"].flops_per_sample == pytest.approx(arms["deeper"].flops_per_sample, rel=1e-6)
    assert arms["wider"].flops_per_sample == pytest.approx(arms["deeper"].flops_per_sample, rel=0.1)


@pytest.mark.parametrize("path", sorted(Path("configs/grids").glob("*.yaml")), ids=lambda path: path.stem)
def test_arms_of_every_grid_cost_the_same(path: Path) -> None:
    arms = compare_depths.arms_of(compare_depths.read_grid(path))
    costs = [arm.steps * arm.flops_per_sample for arm in arms]
    assert len(arms) > 3
    assert max(costs) < 1.01 * min(costs)


def test_adapters_of_a_frozen_base_have_as_many_parameters() -> None:
    arms = {
        arm.name: arm.parameters
        for arm in compare_depths.arms_of(
            compare_depths.read_grid(Path("configs/grids/mazes_fine_tuning.yaml"))
        )
    }
    base = arms.pop("full")
    added = [parameters - base for parameters in arms.values()]
    assert max(added) < 1.02 * min(added)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "deepest"}, "none of its arms"),
        ({"seeds": "0"}, "seeds"),
        ({"sed": [0]}, "sed"),
        ({"overrides": ["model.hiden_size=3"]}, "hidden_size"),
    ],
)
def test_a_wrong_grid_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID | changes))
    with pytest.raises(UserError, match=message):
        compare_depths.arms_of(compare_depths.read_grid(tmp_path / "grid.yaml"))


def row(depth: int | None, right: list[int], steps: list[int]) -> dict:
    by_steps = {
        f"{first}-{last}": {"exact": sum(chosen) / len(chosen), "grids": len(chosen)}
        for first, last in ((1, 4), (5, 7), (8, 10), (11, 13), (14, 16))
        if (chosen := [value for value, number in zip(right, steps, strict=True) if first <= number <= last])
    }
    return {
        "sampling_steps": 1,
        "depth": depth,
        "exact": sum(right) / len(right),
        "by_steps": by_steps,
        "right": right,
    }


def test_the_report_says_what_was_run_what_not_and_what_the_rule_decides(tmp_path: Path) -> None:
    settings = MazeSettings(canvas=6, train_steps=7, test_sides=(6,), test_steps=(4, 7, 10, 13, 16))
    build_mazes(tmp_path / "set", settings, {"train": 1, "val": 0, "test": 50}, seed=0)
    grid = GRID | {"data": str(tmp_path / "set"), "sampling_steps": [1]}
    arms = compare_depths.arms_of(grid)
    _, grids = compare_depths.read_set(tmp_path / "set", None)
    steps = [each.steps for each in grids]
    reach = {"deeper": {None: 7}, "loop + supervision": {4: 10, 8: 16}, "paper + supervision": {4: 7, 8: 13}}
    for name, depths in reach.items():
        for seed in (0, 1):
            folder = compare_depths.folder_of(tmp_path / "out", name, seed) / "scores"
            folder.mkdir(parents=True)
            rows = [
                row(depth, [int(number <= most) for number in steps], steps) for depth, most in depths.items()
            ]
            (folder / "results.json").write_text(json.dumps({"rows": rows}))
    text = compare_depths.report(arms, grid, tmp_path / "out")
    lines = {
        tuple(line.split(" | ")[i].strip("| ") for i in (0, 3)): line
        for line in text.splitlines()
        if " | " in line
    }
    # A third of the grids that need more than 7 steps need up to 10, another third up to 13.
    assert "| 0.000 | - | 2 |" in lines["deeper", "-"]
    assert "| 0.333 | +0.333 ±" in lines["loop + supervision", "4"]
    assert "| 1.000 | +1.000 ± 0.000 | 2 |" in lines["loop + supervision", "8"]
    assert "| 0.000 | +0.000 ± 0.000 | 2 |" in lines["paper + supervision", "4"]
    assert "At depth 4: Recursion is not shown to help: `loop + supervision` exceeds" in text
    assert "At depth 8: Recursion is shown to help" in text
    assert "deeper (seed 2)" in text
    assert "wider (seed 0)" in text
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000


def test_an_arm_of_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    (arm,) = [arm for arm in compare_depths.arms_of(GRID) if arm.name == "dense"]
    folder = compare_depths.folder_of(tmp_path, "dense", 0)
    folder.mkdir()
    (folder / "arm.json").write_text(json.dumps({"steps": 1}))
    with pytest.raises(UserError, match="made by other settings"):
        compare_depths.run_arm(arm, 0, GRID, tmp_path)
