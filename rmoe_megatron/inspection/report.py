"""One page about a run, or about several beside each other: ``rmoe report``."""

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from omegaconf import MISSING, OmegaConf

from rmoe_megatron.checkpoint.folders import CheckpointFolder, list_checkpoints
from rmoe_megatron.config.loading import load_config, to_yaml
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.images import embedded
from rmoe_megatron.files.regular import read_bytes
from rmoe_megatron.training.curves import read_records
from rmoe_megatron.training.history import Event, count_restarts, read_history
from rmoe_megatron.training.logging import METRICS

MAX_PICTURE = 1 << 26  # bytes of a sample grid
SHOWN_GRIDS = 24
MISSING_TEXT = json.dumps(MISSING)  # of a key without a default
PANELS: dict[str, tuple[tuple[str, ...], str]] = {
    "Loss": (("loss", "validation_loss", "fixed_timestep_loss"), "log"),
    "Gradient and learning rate": (("grad_norm", "learning_rate"), "log"),
    "Speed": (("samples_per_second",), "linear"),
    "Share of time that waits for data": (("data_wait_share",), "linear"),
    "Gates": (
        ("gate_entropy", "gate_switch_rate", "gate_by_timestep", "gate_by_text", "gate_by_token", "module_share_least", "module_share_most"),
        "linear",
    ),
    "Memory (GB)": (("gpu_memory_gigabytes",), "linear"),
}  # fmt: skip
# Of a step's record: what is no score of an evaluation.
KNOWN = (
    "step", "loss", "validation_loss", "fixed_timestep_loss", "grad_norm", "learning_rate", "samples", "skipped_steps", "restarts",
    "load_balancing_loss", "gate_", "module_share_", "gpu_memory_gigabytes", "tokens_per_", "model_", "data_wait_", "bad_samples",
)  # fmt: skip
STYLE = """
body { font-family: sans-serif; margin: 2em; max-width: 90em } table { border-collapse: collapse }
td, th { padding: 0.2em 0.8em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top } img { max-width: 100% }
pre { overflow-x: auto } .grids { display: flex; flex-wrap: wrap; gap: 2em } .grids input { width: 20em }
"""
SLIDER = """
for (const box of document.querySelectorAll('.grid')) {
  const pictures = box.querySelectorAll('img'), steps = box.querySelector('output'), slider = box.querySelector('input');
  const show = () => pictures.forEach((each, number) => {
    each.hidden = number != slider.value;
    if (number == slider.value) steps.textContent = each.alt;
  });
  slider.addEventListener('input', show); show();
}
"""


@dataclass(frozen=True)
class Run:
    """What a run's folder tells."""

    name: str
    config: RunConfig
    records: list[tuple[int, dict[str, float | None]]]
    history: list[Event]
    checkpoints: list[CheckpointFolder]
    grids: list[tuple[int, Path]]  # of samples, by step

    @classmethod
    def read(cls, run_dir: Path) -> "Run":
        """Read a run that is trained, or was.

        Raises:
            UserError: there is no such run, or a file of it is not what it should be.
        """
        path = run_dir / "config.yaml"
        if not path.is_file():
            raise UserError(f"There is no run at {run_dir}; give the run_dir of an earlier `rmoe train`.")
        metrics = run_dir / METRICS
        pictures = sorted((run_dir / "samples").glob("step-*.png"))
        return cls(
            str(run_dir), load_config(path, []), _with_shares(read_records(metrics)) if metrics.exists() else [],
            read_history(run_dir), list_checkpoints(run_dir),
            [(int(each.stem.removeprefix("step-")), each) for each in pictures if each.stem.removeprefix("step-").isdigit()],
        )  # fmt: skip

    def values(self, name: str) -> list[tuple[int, float]]:
        """Return a metric by step, where it is there and finite."""
        return [(step, value) for step, record in self.records if (value := record.get(name)) is not None]

    def scores(self) -> list[str]:
        """Return the names of the scores of evaluations between steps."""
        names = {name for _, record in self.records for name in record}
        return sorted(name for name in names if not name.startswith(KNOWN) and name != "samples_per_second")


def _with_shares(
    records: list[tuple[int, dict[str, float | None]]],
) -> list[tuple[int, dict[str, float | None]]]:
    """Add the share of a step's time in which it waited for data."""
    for _, record in records:
        wait, speed, before = (
            record.get(name) for name in ("data_wait_seconds", "samples_per_second", "samples")
        )
        if wait is not None and speed and before:
            step = before / max(record["step"] or 1, 1) / speed
            record["data_wait_share"] = min(wait / step, 1.0)
    return records


def write_report(run_dirs: Sequence[Path], out: Path) -> None:
    """Write one HTML page about runs, which loads nothing from elsewhere; what is there under its name is replaced.

    Raises:
        UserError: one is no run, or ``out`` cannot be written.
    """
    runs = [Run.read(run_dir) for run_dir in run_dirs]
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(out, page(runs))


def page(runs: Sequence[Run]) -> str:
    """Return the page."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>",
        _table(["", *(run.name for run in runs)], summary(runs)),
        "<h2>Curves</h2>",
        f"<img src='{embedded(draw(runs))}' alt='curves'>",
        _scores(runs),
        _grids(runs),
        _events(runs),
        _configuration(runs),
        f"<script>{SLIDER}</script></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def summary(runs: Sequence[Run]) -> list[list[str]]:
    """Return the rows of the table at the top: a name, and what each run has."""
    rows: dict[str, list[str]] = {name: [] for name in ("state", "step", "samples", "loss", "best validation loss", "samples/s (median)", "TFLOP/s", "MFU",
                                  "restarts", "skipped steps", "newest checkpoint")}  # fmt: skip
    for run in runs:
        last = run.records[-1][0] if run.records else 0
        best = min(run.values("validation_loss"), key=lambda each: each[1], default=None)
        rows["state"].append(state(run.history))
        rows["step"].append(f"{last} of {run.config.training.steps}")
        rows["samples"].append(_last(run, "samples", "{:,.0f}"))
        rows["loss"].append(_last(run, "loss", "{:.4g}"))
        rows["best validation loss"].append("" if best is None else f"{best[1]:.4g} at step {best[0]}")
        rows["samples/s (median)"].append(_median(run, "samples_per_second", "{:.4g}"))
        rows["TFLOP/s"].append(_median(run, "model_tflops", "{:.4g}"))
        rows["MFU"].append(_median(run, "model_flops_utilisation", "{:.1%}"))
        rows["restarts"].append(str(count_restarts(run.history)))
        rows["skipped steps"].append(_last(run, "skipped_steps", "{:.0f}"))
        rows["newest checkpoint"].append(f"step {run.checkpoints[0].step}" if run.checkpoints else "none")
    return [[name, *values] for name, values in rows.items() if any(values)]


def state(history: Sequence[Event]) -> str:
    """Return in words what a run was doing last, and since when."""
    if not history:
        return "nothing is known of its start"
    event = history[-1]
    when = datetime.fromisoformat(event["time"]).strftime("%Y-%m-%d %H:%M")
    words = {
        "started": "is trained, or was killed", "resumed": "is trained, or was killed", "finished": "finished",
        "interrupted": "was asked to stop", "failed": "failed",
    }  # fmt: skip
    return f"{words[event['event']]} ({'since' if event['event'] in ('started', 'resumed') else 'at'} {when})"


def _last(run: Run, name: str, form: str) -> str:
    values = run.values(name)
    return form.format(values[-1][1]) if values else ""


def _median(run: Run, name: str, form: str) -> str:
    values = sorted(value for _, value in run.values(name))
    return form.format(values[len(values) // 2]) if values else ""


def draw(runs: Sequence[Run]) -> bytes:
    """Draw the curves of all runs, a panel for each group of metrics that there is; returns a PNG."""
    panels = {
        title: (names, scale)
        for title, (names, scale) in PANELS.items()
        if any(run.values(name) for run in runs for name in names)
    }
    if scores := sorted({name for run in runs for name in run.scores()}):
        panels["Scores"] = (tuple(scores), "linear")
    columns = min(3, max(len(panels), 1))
    rows = max(math.ceil(len(panels) / columns), 1)
    figure = Figure(figsize=(6 * columns, 4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, (names, scale)) in zip(grid, panels.items(), strict=False):
        for number, run in enumerate(runs):
            for order, name in enumerate(names):
                points = run.values(name)
                if points:
                    label = (
                        name
                        if len(runs) == 1
                        else f"{Path(run.name).name}: {name}"
                        if len(names) > 1
                        else Path(run.name).name
                    )
                    style = ("-", "--", ":", "-.")[number % 4] if len(names) > 1 else "-"
                    color = f"C{(order if len(names) > 1 else number) % 10}"
                    axes.plot(
                        *zip(*points, strict=True),
                        style,
                        color=color,
                        label=label,
                        marker="." if len(points) < 30 else None,
                        linewidth=1,
                    )
        axes.set(title=title, xlabel="step", yscale=scale)
        axes.legend(fontsize=6)
        axes.grid(alpha=0.3)
    for axes in figure.axes[len(panels) :]:
        axes.set_axis_off()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()


def _scores(runs: Sequence[Run]) -> str:
    names = sorted({name for run in runs for name in run.scores()})
    if not names:
        return ""
    rows = [[name, *(_last(run, name, "{:.3f}") for run in runs)] for name in names]
    return "<h2>Scores (last)</h2>" + _table(["", *(run.name for run in runs)], rows)


def _grids(runs: Sequence[Run]) -> str:
    boxes = []
    for run in runs:
        if not run.grids:
            continue
        step = max(math.ceil(len(run.grids) / SHOWN_GRIDS), 1)
        shown = run.grids[::-step][::-1]  # the last is among them
        images = "".join(
            f"<img src='{embedded(read_bytes(path, MAX_PICTURE))}' alt='step {number}'{'' if number == shown[-1][0] else ' hidden'}>"
            for number, path in shown
        )
        slider = f"<input type=range min=0 max={len(shown) - 1} value={len(shown) - 1}> <output></output>"
        boxes.append(f"<div class=grid><h3>{escape(run.name)}</h3>{slider}<br>{images}</div>")
    return f"<h2>Samples</h2><div class=grids>{''.join(boxes)}</div>" if boxes else ""


def _events(runs: Sequence[Run]) -> str:
    rows = [
        [
            run.name,
            event["time"],
            event["event"],
            str(event["step"]),
            str(event["ranks"]),
            str(event.get("job", "")),
            event.get("why", ""),
        ]
        for run in runs
        for event in run.history
    ]
    return (
        "<h2>Events</h2>" + _table(["run", "time", "event", "step", "ranks", "job", "why"], rows)
        if rows
        else ""
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested values under dotted keys, as JSON texts."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(value)
    return found


def _configuration(runs: Sequence[Run]) -> str:
    configs = [flat(_plain(run.config)) for run in runs]
    if len(runs) == 1:
        default = flat(_plain(RunConfig))
        rows = [
            [key, value, "" if default.get(key) == MISSING_TEXT else default.get(key, "")]
            for key, value in configs[0].items()
            if value != default.get(key)
        ]
        told = "<h2>Configuration: what differs from the defaults</h2>" + _table(
            ["key", "value", "default"], rows
        )
        return f"{told}<details><summary>The whole configuration</summary><pre>{escape(to_yaml(runs[0].config))}</pre></details>"
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [
        [key, *(config.get(key, "") for config in configs)]
        for key in keys
        if len({config.get(key) for config in configs}) > 1
    ]
    return "<h2>Configuration: where the runs differ</h2>" + _table(
        ["key", *(run.name for run in runs)], rows
    )


def _plain(config: RunConfig | type[RunConfig]) -> Any:
    return OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True, throw_on_missing=False)


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    columns = "".join(f"<th>{escape(each)}" for each in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rows)
    return f"<table><tr>{columns}{lines}</table>"
