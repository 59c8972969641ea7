"""The metrics of a run as a picture."""

import io
import math
from pathlib import Path

from matplotlib.figure import Figure
from pydantic import TypeAdapter

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.untrusted import lines_of, parse_json, read_text

MAX_BYTES = 1 << 30  # some million records
MAX_STEP = 100_000_000
RECORD = TypeAdapter(dict[str, float | None])

PANELS: dict[tuple[str, ...], str] = {
    ("loss", "validation_loss"): "log",
    ("grad_norm", "learning_rate"): "log",
    ("samples_per_second",): "linear",
}
GATES = (
    "gate_entropy", "gate_switch_rate", "gate_by_timestep", "gate_by_text", "gate_by_token", "module_share_least", "module_share_most",
)  # fmt: skip


def read_records(metrics: Path) -> list[tuple[int, dict[str, float | None]]]:
    """Return the records of ``metrics.jsonl``, each with its step; an incomplete last line is passed over.

    Raises:
        UserError: the file cannot be read, or another line is no record; names the line.
    """
    text = read_text(metrics, MAX_BYTES)
    lines = lines_of(text)
    if lines and not text.endswith("\n"):  # a killed run tore it
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        where = f"Line {number} of {metrics}"
        # Python writes NaN and Infinity, which JSON does not have; here they are what is not finite elsewhere: null.
        record = parse_json(line, RECORD, where, allow_infinite=True)
        record = {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in record.items()
        }
        step = record.get("step")
        if step is None or not 0 <= step < MAX_STEP:
            raise UserError(f"{where} has no step; move the file away.")
        records.append((int(step), record))
    return records


def draw_curves(metrics: Path) -> bytes:
    """Draw ``metrics.jsonl`` over the optimizer steps, one panel for each group of ``PANELS``, and one of the gates of a model that has some.

    Returns a PNG.

    Values that were not finite are null in the file and gaps in the picture.
    """
    records = read_records(metrics)
    panels = dict(PANELS)
    if any(name in record for _, record in records for name in GATES):
        panels[GATES] = "linear"
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (names, scale) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in names:
            points = [(step, record[name]) for step, record in records if record.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else None)
        axes.set_xlabel("step")
        axes.set_yscale(scale)
        if axes.get_lines():  # matplotlib warns of a legend of nothing
            axes.legend()
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
