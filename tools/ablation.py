"""The paper's ablation on the toy set: fine-tunes a frozen base in every variant and makes the table.

    python tools/ablation.py OUT --base RUN --data ENCODED --shapes SHAPES [--config CONFIG] [--seeds 3] [--jobs 2]

Every variant is the configuration with a few overrides, trained for several seeds, exported and scored by
`rmoe eval shapes`. OUT gets results.json, results.md (mean and spread over seeds) and results.png. What is finished is
skipped when it is run again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from pydantic import TypeAdapter, with_config
from tqdm import tqdm

from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.untrusted import OPEN, read_json


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    overrides: tuple[str, ...]


@with_config(OPEN)
class SplitResults(TypedDict):
    """What ``results.json`` says of one split."""

    overall: float
    skills: dict[str, float]


@with_config(OPEN)
class Splits(TypedDict):
    """Prompts with (colour, shape) pairs of training and with others."""

    seen: SplitResults
    heldout: SplitResults


@with_config(OPEN)
class Results(TypedDict):
    """``results.json`` of ``rmoe eval shapes``."""

    splits: Splits


RESULTS = TypeAdapter(Results)


@dataclass(frozen=True)
class Score:
    """Share of right images of one run: overall on seen and held-out prompts, and by skill on seen ones."""

    seen: float
    heldout: float
    skills: dict[str, float]


def variants(config: RunConfig) -> list[Variant]:
    """Return the paper's rows around the configuration's own recurrence; each differs by one override."""
    assert config.recurrence is not None
    recurrence = config.recurrence
    layers, middle = recurrence.layers, recurrence.layers[len(recurrence.layers) // 2]
    modules, steps = recurrence.num_modules, recurrence.steps
    rows = [
        Variant("SFT", ("recurrence=null", "fine_tuning.trainable=blocks", f"fine_tuning.blocks={layers}")),
        Variant("LoRA", ("recurrence=null", f"lora={{layers: {layers}, rank: {recurrence.rank}}}")),
        Variant(f"recursive M={modules} T={steps}", ()),
        Variant("without step modulation", ("recurrence.modulation=false",)),
        Variant("gate on tokens only", ("recurrence.gate_inputs=[tokens]",)),
        Variant("one block", (f"recurrence.layers=[{middle}]",)),
    ]
    rows += [Variant(f"T={value}", (f"recurrence.steps={value}",)) for value in (1, 5) if value != steps]
    rows += [
        Variant(f"M={value}", (f"recurrence.num_modules={value}",)) for value in (1, 5) if value != modules
    ]
    return rows


def rmoe(*arguments: str, log: Path) -> None:
    """Run a command; its output goes to a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        command = [sys.executable, "-m", "rmoe_megatron", *arguments]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code != 0:
        sys.exit(f"error: rmoe {' '.join(arguments)} failed; see {log}.")


def score(run: Path, folder: Path, shapes: Path, limit: int) -> Score:
    """Export a run and score it."""
    log = folder / "log.txt"
    results = folder / "scores" / "results.json"
    if not results.is_file():
        if not (folder / "model").is_dir():
            rmoe("convert", "to-hf", str(run), str(folder / "model"), log=log)
        options = ["--limit", str(limit), "--steps", "20"]
        scores = str(results.parent)
        rmoe(
            "eval", "shapes", str(folder / "model"), "--data", str(shapes), "--out", scores, *options, log=log
        )
    splits = read_json(results, RESULTS)["splits"]
    seen, heldout = splits["seen"], splits["heldout"]
    return Score(seen["overall"], heldout["overall"], seen["skills"])


def train_and_score(variant: Variant, seed: int, arguments: argparse.Namespace) -> Score:
    """Train one variant with one seed, unless that is done, and score it."""
    folder: Path = arguments.out / f"{variant.name.replace(' ', '_')}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "trained"
    if not done.exists():
        settings = [
            f"run_dir={folder / 'run'}",
            f"seed={seed}",
            f"fine_tuning.base={arguments.base}",
            f"data.train={arguments.data / 'train'}",
            f"data.validation={arguments.data / 'val'}",
            *variant.overrides,
        ]
        has_checkpoint = any((folder / "run" / "checkpoints").glob("step-????????"))
        run = ["--resume", str(folder / "run")] if has_checkpoint else [str(arguments.config), *settings]
        rmoe("train", *run, log=folder / "log.txt")
        atomic.write(done, "")
    return score(folder / "run", folder, arguments.shapes, arguments.limit)


def table(rows: dict[str, list[Score]]) -> str:
    """Return the results as Markdown: mean ± standard deviation over seeds, in percent."""
    skills = list(next(iter(rows.values()))[0].skills)
    names = ["model (toy)", "seen", "held-out", *(skill.replace("_", " ") for skill in skills)]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for name, scores in rows.items():
        columns = [[score.seen for score in scores], [score.heldout for score in scores]]
        columns += [[score.skills[skill] for score in scores] for skill in skills]
        lines.append(f"| {name} | " + " | ".join(spread(values) for values in columns) + " |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """Return mean ± standard deviation in percent."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def plot(rows: dict[str, list[Score]], path: Path) -> None:
    """Draw every run as a dot and every variant's mean as a bar."""
    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(rows) + 1.2), layout="constrained")
    for index, scores in enumerate(rows.values()):
        for offset, values, color in (
            (-0.2, [score.seen for score in scores], "tab:blue"),
            (0.2, [score.heldout for score in scores], "tab:orange"),
        ):
            axes.barh(index + offset, statistics.mean(values), height=0.36, color=color, alpha=0.5)
            axes.plot(values, [index + offset] * len(values), "k.", markersize=4)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("share of right images (toy set); blue: seen pairs, orange: held-out pairs")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Run the grid and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", type=Path, required=True, help="run of the dense base")
    parser.add_argument("--data", type=Path, required=True, help="folder of `rmoe data precompute`")
    parser.add_argument("--shapes", type=Path, required=True, help="folder of `rmoe data build-shapes`")
    parser.add_argument("--config", type=Path, default=Path("configs/shapes_tiny_fine_tuning.yaml"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=60, help="prompts per split")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    grid = variants(load_config(arguments.config, []))
    jobs = [(variant, seed) for seed in range(arguments.seeds) for variant in grid]
    (arguments.out / "base").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Score]] = {
        "base": [score(arguments.base, arguments.out / "base", arguments.shapes, arguments.limit)]
    }
    rows |= {variant.name: [] for variant in grid}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        scores = pool.map(lambda job: train_and_score(job[0], job[1], arguments), jobs)
        for (variant, _), found in zip(jobs, tqdm(scores, total=len(jobs), unit="run"), strict=True):
            rows[variant.name].append(found)
    results: dict[str, Any] = {name: [vars(found) for found in scores] for name, scores in rows.items()}
    atomic.write(arguments.out / "results.json", json.dumps(results, indent=1) + "\n")
    atomic.write(arguments.out / "results.md", table(rows))
    plot(rows, arguments.out / "results.png")
    print(table(rows))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
