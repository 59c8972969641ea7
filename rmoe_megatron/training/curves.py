"""The metrics of a run as a picture."""

import io
import json
from pathlib import Path

from matplotlib.figure import Figure

PANELS = {
    ("loss", "validation_loss"): "log",
    ("grad_norm", "learning_rate"): "log",
    ("samples_per_second",): "linear",
}


def draw_curves(metrics: Path) -> bytes:
    """Draw ``metrics.jsonl`` over the optimizer steps, one panel for each group of ``PANELS``; returns a PNG.

    Values that were not finite are null in the file and gaps in the picture.
    """
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure = Figure(figsize=(5 * len(PANELS), 4), layout="constrained")
    for axes, (names, scale) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for name in names:
            points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else None)
        axes.set_xlabel("step")
        axes.set_yscale(scale)
        axes.legend()
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
