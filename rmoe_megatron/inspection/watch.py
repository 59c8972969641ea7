"""A screen that shows how runs are going while they train: ``rmoe watch``. It only reads, so runs of others can be watched."""

import math
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from rmoe_megatron.inspection.report import Run, state
from rmoe_megatron.training.history import count_restarts
from rmoe_megatron.training.logging import METRICS

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 24  # of a sparkline, in characters
EVENTS = 3  # shown of a run, if it is alone


def sparkline(values: Sequence[float], width: int = WIDTH) -> str:
    """Return values as bars between their least and their most, on a scale of logarithms if all are positive.

    If there are more values than ``width``, they are cut into equal parts, and the mean of each part is shown.
    """
    if not values:
        return ""
    parts = np.array_split(np.asarray(values, dtype=float), min(width, len(values)))
    means = np.array([part.mean() for part in parts])
    heights = np.log(means) if (means > 0).all() else means
    span = heights.max() - heights.min()
    levels = (
        np.zeros(len(heights), dtype=int)
        if span == 0
        else ((heights - heights.min()) / span * (len(BARS) - 1)).round().astype(int)
    )
    return "".join(BARS[level] for level in levels)


def remaining_seconds(run: Run) -> float | None:
    """Return the seconds to a run's end at the median pace of the last ten records; None if it is not known."""
    paced = [
        record for _, record in run.records if record.get("samples_per_second") and record.get("samples")
    ][-10:]
    if not paced:
        return None
    last = paced[-1]
    step, samples = last["step"] or 0, last["samples"] or 0
    if not step:
        return None
    rates = sorted(record["samples_per_second"] or math.inf for record in paced)
    return max(run.config.training.steps - step, 0) * samples / step / rates[len(rates) // 2]


def age_of(path: Path, now: float) -> str:
    """Return how long ago a file was written, in words."""
    return f"{tqdm.format_interval(max(now - path.stat().st_mtime, 0))} ago" if path.exists() else ""


def lines_of_run(run: Run, now: float) -> list[tuple[str, str]]:
    """Return names and values of what the screen shows of a run; what is not known is left out.

    Args:
        now: seconds since 1970.
    """

    def last(name: str, form: str) -> str:
        values = run.values(name)
        return form.format(values[-1][1]) if values else ""

    def curve(name: str) -> str:
        values = [value for _, value in run.values(name)]
        return f"{values[-1]:.4g}  {sparkline(values)}" if values else ""

    remaining = remaining_seconds(run)
    is_over = bool(run.history) and run.history[-1]["event"] == "finished"
    gates = [
        last("gate_entropy", "entropy {:.2f}"),
        last("module_share_least", "shares {:.1%}"),
        last("module_share_most", "to {:.1%}"),
    ]
    speed = [
        last("samples_per_second", "{:.4g} samples/s"), last("model_tflops", "{:.3g} TFLOP/s"),
        last("model_flops_utilisation", "MFU {:.1%}"), last("data_wait_share", "{:.1%} of it waiting for data"),
    ]  # fmt: skip
    newest = run.checkpoints[0] if run.checkpoints else None
    rows = [
        ("state", state(run.history)),
        ("last record", age_of(Path(run.name) / METRICS, now)),
        ("time left", "" if is_over or remaining is None else tqdm.format_interval(remaining)),
        ("loss", curve("loss")),
        ("validation loss", curve("validation_loss")),
        ("speed", ", ".join(each for each in speed if each)),
        ("GPU memory", last("gpu_memory_gigabytes", "{:.1f} GB")),
        ("gates", " ".join(each for each in gates if each)),
        ("checkpoint", "" if newest is None else f"step {newest.step}, {age_of(newest.path, now)}"),
        ("restarts", str(count_restarts(run.history))),
        ("skipped steps", last("skipped_steps", "{:.0f}")),
        *((name, curve(name)) for name in run.scores()),
    ]
    return [(name, value) for name, value in rows if value]


def frame(runs: Sequence[Run], now: float) -> Group:
    """Return what the screen shows of runs: one below the other, or if there are more than two, one in a line."""
    if len(runs) > 2:
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        for name in ("run", "step", "state", "left", "loss", "", "validation", "samples/s"):
            table.add_column(name, no_wrap=True)
        for run in runs:
            shown = dict(lines_of_run(run, now))
            loss = [value for _, value in run.values("loss")]
            table.add_row(
                Path(run.name).name, _steps(run), _word(run), shown.get("time left", ""),
                shown.get("loss", "").partition("  ")[0], sparkline(loss, WIDTH // 3), shown.get("validation loss", "").partition("  ")[0],
                shown.get("speed", "").partition(" ")[0],
            )  # fmt: skip
        return Group(table)
    parts: list[Text | Table] = []
    for run in runs:
        done = run.records[-1][0] if run.records else 0
        table = Table.grid(padding=(0, 2))
        table.add_row("step", _steps(run))
        table.add_row("", ProgressBar(total=run.config.training.steps, completed=done, width=WIDTH * 2))
        for name, value in lines_of_run(run, now):
            table.add_row(name, value)
        for event in run.history[-EVENTS:]:
            table.add_row(event["event"], f"{event['time']}  step {event['step']}  {event.get('why', '')}")
        parts += [Text(run.name, style="bold"), table, Text("")]
    return Group(*parts)


def _word(run: Run) -> str:
    """Return in one word what a run does."""
    words = {"finished": "finished", "interrupted": "stopped", "failed": "failed"}
    return words.get(run.history[-1]["event"], "trains") if run.history else ""


def _steps(run: Run) -> str:
    return f"{run.records[-1][0] if run.records else 0}/{run.config.training.steps}"


def watch(run_dirs: Sequence[Path], interval: float, once: bool) -> None:
    """Show runs, and every ``interval`` seconds anew until Ctrl-C, or ``once``.

    Raises:
        UserError: one is no run, or a file of it is not what it should be.
    """
    console = Console()
    if once:
        console.print(frame([Run.read(run_dir) for run_dir in run_dirs], time.time()))
        return
    ended = threading.Event()
    # Not KeyboardInterrupt, which a library that reads a file may catch.
    before = signal.signal(signal.SIGINT, lambda number, frame: ended.set())
    try:
        with (
            Live(console=console, auto_refresh=False, screen=True)
            if console.is_terminal
            else nullcontext() as live
        ):
            while not ended.is_set():
                shown = frame([Run.read(run_dir) for run_dir in run_dirs], time.time())
                if live is None:
                    console.print(shown)
                else:
                    live.update(shown, refresh=True)
                ended.wait(interval)
    finally:
        signal.signal(signal.SIGINT, before)
