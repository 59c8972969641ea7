"""Trains the arms of a grid with equal FLOPs, scores them on mazes and compares them: does recursion help?

    python tools/compare_depths.py configs/grids/mazes_small.yaml OUT [--only ARM]... [--seeds 0,1] [--jobs 2] [--report]

An arm is the grid's configuration with a few overrides. It trains as many steps as the budget has for it by the project's counter of
training FLOPs, is exported and scored by `rmoe eval mazes` at every number of sampling steps and every depth of the grid. OUT gets
results.md (a table, differences from the reference, what the rule says, what was not run), results.json and curves.png. What is
finished is skipped when it is run again; --report trains nothing.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import matplotlib

matplotlib.use("Agg")
import numpy as np
import yaml
from matplotlib import pyplot
from pydantic import TypeAdapter, with_config

from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.mazes.comparison import CLAIMED, Verdicts, difference, verdict
from rmoe_megatron.evaluation.mazes.evaluate import read_set
from rmoe_megatron.files import atomic
from rmoe_megatron.files.untrusted import CLOSED, check_value, read_json, read_text
from rmoe_megatron.model.flops import training_flops_per_sample
from rmoe_megatron.model.parameters import dense_parameters, expert_parameters

LONGER = "longer than trained"


@with_config(CLOSED)
class ArmSettings(TypedDict):
    """One arm: overrides of the grid's configuration, and the depths that it is sampled with (empty: as trained)."""

    overrides: list[str]
    depths: list[int]


@with_config(CLOSED)
class Budget(TypedDict):
    """Training FLOPs: those of an arm and a number of its steps."""

    arm: str
    steps: int


@with_config(CLOSED)
class GridFile(TypedDict):
    """A grid of arms; ``depth`` is that of training, ``reference`` the arm that others are compared with."""

    config: str
    data: str
    overrides: list[str]
    budget: Budget
    seeds: list[int]
    sampling_steps: list[int]
    depth: int
    reference: str
    arms: dict[str, ArmSettings]


GRID = TypeAdapter(GridFile)
OBJECT = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class Arm:
    """An arm with what follows from the budget."""

    name: str
    overrides: list[str]
    depths: list[int]
    steps: int
    flops_per_sample: float
    parameters: int


def read_grid(path: Path) -> GridFile:
    """Read a grid.

    Raises:
        UserError: the file is none.
    """
    try:
        values = yaml.safe_load(read_text(path, 1 << 20))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {error}.") from error
    return check_value(values, GRID, str(path))


def arms_of(grid: GridFile) -> list[Arm]:
    """Return the arms, each with the steps that the budget has for it.

    Raises:
        UserError: the budget or the reference names no arm, or a configuration is wrong.
    """
    for key, name in (("budget.arm", grid["budget"]["arm"]), ("reference", grid["reference"])):
        if name not in grid["arms"]:
            raise UserError(f"{key} {name!r} of the grid is none of its arms: {', '.join(grid['arms'])}.")
    configs = {name: _config(grid, arm["overrides"]) for name, arm in grid["arms"].items()}
    budget = grid["budget"]["steps"] * _flops_of_step(configs[grid["budget"]["arm"]])
    return [
        Arm(
            name,
            [*grid["overrides"], *arm["overrides"]],
            arm["depths"],
            round(budget / _flops_of_step(configs[name])),
            training_flops_per_sample(configs[name]),
            dense_parameters(configs[name]) + expert_parameters(configs[name]),
        )
        for name, arm in grid["arms"].items()
    ]


def _config(grid: GridFile, overrides: list[str]) -> RunConfig:
    return load_config(Path(grid["config"]), [*grid["overrides"], *overrides])


def _flops_of_step(config: RunConfig) -> float:
    return training_flops_per_sample(config) * config.training.global_batch_size


def rmoe(*arguments: str, log: Path) -> None:
    """Run a command; its output goes to a file."""
    with log.open("a") as file:
        command = [sys.executable, "-m", "rmoe_megatron", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code != 0:
        raise UserError(f"rmoe {' '.join(arguments)} failed; see {log}.")


def run_arm(arm: Arm, seed: int, grid: GridFile, out: Path) -> None:
    """Train, export and score an arm with a seed, or what of it is not done.

    Raises:
        UserError: the folder holds another arm's work, or a command failed.
    """
    folder = folder_of(out, arm.name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    made_by = json.loads(
        json.dumps({"grid": grid["config"], "data": grid["data"], "seed": seed, **vars(arm)})
    )
    record, log = folder / "arm.json", folder / "log.txt"
    if not record.is_file():
        atomic.write(record, json.dumps(made_by, indent=1) + "\n")
    if read_json(record, OBJECT) != made_by:
        raise UserError(
            f"{folder} was made by other settings than {arm.name} has now; choose another OUT, or remove it first."
        )
    results = folder / "scores" / "results.json"
    if results.is_file():
        return
    if not (folder / "trained").exists():
        data, run = Path(grid["data"]), folder / "run"
        settings = [
            *arm.overrides, f"run_dir={run}", f"seed={seed}", f"training.steps={arm.steps}",
            f"encoders.text_encoder={data / 'encoder'}", f"data.train={data / 'train'}", f"data.validation={data / 'val'}",
        ]  # fmt: skip
        started = any((run / "checkpoints").glob("step-????????"))
        rmoe("train", *(["--resume", str(run)] if started else [grid["config"], *settings]), log=log)
        atomic.write(folder / "trained", "")
    if not (folder / "model").is_dir():
        rmoe("convert", "to-hf", str(folder / "run"), str(folder / "model"), log=log)
    options = ["--data", grid["data"], "--out", str(results.parent), "--dtype", "fp32"]
    options += ["--steps", ",".join(map(str, grid["sampling_steps"]))]
    if arm.depths:
        options += ["--depths", ",".join(map(str, arm.depths))]
    rmoe("eval", "mazes", str(folder / "model"), *options, log=log)


def folder_of(out: Path, arm: str, seed: int) -> Path:
    """Return the folder of an arm and a seed."""
    return out / f"{arm.replace(' ', '_')}-seed{seed}"


def finished(arms: list[Arm], grid: GridFile, out: Path) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Return the rows of `rmoe eval mazes` of every arm and seed that is done."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {arm.name: {} for arm in arms}
    for arm in arms:
        for seed in grid["seeds"]:
            path = folder_of(out, arm.name, seed) / "scores" / "results.json"
            if path.is_file():
                found[arm.name][seed] = read_json(path, OBJECT)["rows"]
    return found


def verdicts_of(
    rows: dict[int, list[dict[str, Any]]], chosen: np.ndarray, sampling: int, depth: int | None
) -> Verdicts:
    """Return whether each of the chosen grids is right, by seed."""
    return {
        seed: np.array(row["right"], dtype=np.bool_)[chosen]
        for seed, of_seed in rows.items()
        for row in of_seed
        if row["sampling_steps"] == sampling and row["depth"] == depth
    }


def _depths(arm: Arm) -> list[int | None]:
    """Return the depths that an arm is sampled with; None is as trained."""
    return [*arm.depths] or [None]


def report(arms: list[Arm], grid: GridFile, out: Path) -> str:
    """Return table, differences, the rule's two readings and what is not done, in Markdown."""
    done = finished(arms, grid, out)
    description, grids = read_set(Path(grid["data"]), None)
    chosen = np.array([each.steps > description["train_steps"] for each in grids])
    lines = [
        f"| arm (toy) | parameters | steps | depth | {' | '.join(f'{count} sampling step{"s" * (count > 1)}' for count in grid['sampling_steps'])} | "
        "longer than trained, 1 sampling step | minus reference | seeds |",
        "|---|---|---|---|" + "---|" * (len(grid["sampling_steps"]) + 3),
    ]
    reference = verdicts_of(done[grid["reference"]], chosen, 1, None)
    readings: dict[int, dict[str, Any]] = {grid["depth"]: {}, 2 * grid["depth"]: {}}
    for arm in arms:
        for depth in _depths(arm):
            mine = verdicts_of(done[arm.name], chosen, 1, depth)
            if not mine:
                continue
            shares = [
                np.mean([row["exact"] for of_seed in done[arm.name].values() for row in of_seed if (row["sampling_steps"], row["depth"]) == (count, depth)])
                for count in grid["sampling_steps"]
            ]  # fmt: skip
            found = difference(mine, reference)
            if depth in readings:
                readings[depth][arm.name] = found
            said = "-"
            if found is not None and arm.name != grid["reference"]:
                said = f"{found.mean:+.3f}" + (f" ± {found.error:.3f}" if found.error is not None else "")
            longer = np.mean([values.mean() for values in mine.values()])
            lines.append(
                f"| {arm.name} | {arm.parameters:,} | {arm.steps} | {depth if depth is not None else '-'} | "
                + " | ".join(f"{share:.3f}" for share in shares)
                + f" | {longer:.3f} | {said} | {len(mine)} |"
            )
    lines.append("")
    if set(CLAIMED) <= {arm.name for arm in arms}:  # a grid of another question has no such rule
        lines += [f"At depth {depth}: {verdict(differences)}" for depth, differences in readings.items()]
    missing = [
        f"{arm.name} (seed {seed})" for arm in arms for seed in grid["seeds"] if seed not in done[arm.name]
    ]
    lines += ["", f"Not run: {', '.join(missing) if missing else 'nothing'}."]
    curves(
        arms,
        done,
        [f"{first}-{last}" for first, last in _ranges(description["test_steps"])],
        out / "curves.png",
    )
    return "\n".join(lines) + "\n"


def _ranges(ends: list[int]) -> list[tuple[int, int]]:
    return list(zip([1, *(end + 1 for end in ends[:-1])], ends, strict=True))


def curves(
    arms: list[Arm], done: dict[str, dict[int, list[dict[str, Any]]]], ranges: list[str], path: Path
) -> None:
    """Draw the share of right grids at one sampling step against the steps of the search: an arm a panel, a line for each depth."""
    shown = [arm for arm in arms if done[arm.name]]
    if not shown:
        return
    figure, panels = pyplot.subplots(
        1, len(shown), figsize=(2.6 * len(shown) + 0.6, 3), sharey=True, squeeze=False, layout="constrained"
    )
    for arm, axes in zip(shown, panels[0], strict=True):
        for depth in _depths(arm):
            rows = [
                row
                for of_seed in done[arm.name].values()
                for row in of_seed
                if row["sampling_steps"] == 1 and row["depth"] == depth
            ]
            if rows:
                means = [
                    np.mean([row["by_steps"][name]["exact"] for row in rows])
                    if name in rows[0]["by_steps"]
                    else np.nan
                    for name in ranges
                ]
                axes.plot(
                    ranges, means, marker=".", label=f"T = {depth}" if depth is not None else "as trained"
                )
        axes.set_title(arm.name, fontsize=9)
        axes.tick_params(axis="x", rotation=60, labelsize=7)
        axes.legend(fontsize=7)
    panels[0][0].set_ylabel("exact match, 1 sampling step")
    figure.supxlabel("steps of the search", fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Run the grid, or what of it is asked for, and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", action="append", help="arm to run; repeatable; default is all")
    parser.add_argument("--seeds", help="such of the grid's seeds; default is all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--report", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    grid = read_grid(arguments.grid)
    arms = arms_of(grid)
    unknown = set(arguments.only or []) - {arm.name for arm in arms}
    if unknown:
        raise UserError(
            f"--only {', '.join(sorted(unknown))} is none of the grid's arms: {', '.join(grid['arms'])}."
        )
    seeds = [int(seed) for seed in arguments.seeds.split(",")] if arguments.seeds else grid["seeds"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs = [(arm, seed) for seed in seeds for arm in arms if not arguments.only or arm.name in arguments.only]
    if not arguments.report:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for _ in pool.map(lambda job: run_arm(job[0], job[1], grid, arguments.out), jobs):
                pass
    text = report(arms, grid, arguments.out)
    atomic.write(arguments.out / "results.md", text)
    print(text, end="")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
