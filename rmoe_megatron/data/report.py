"""What a folder of raw shards holds, in numbers and pictures: ``rmoe data check``."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from rmoe_megatron import durable
from rmoe_megatron.data.index import LATENTS
from rmoe_megatron.data.samples import SampleFormat, image_of
from rmoe_megatron.data.shards import ShardDataset
from rmoe_megatron.errors import UserError
from rmoe_megatron.pictures import labelled_grid, png

SHEET = 64  # pictures
THUMBNAIL = 128  # pixels
PATCH = 16  # pixels a side that become one token of SD3: an autoencoder of factor 8 and patches of 2
BYTES_PER_TOKEN = 4  # of English captions, roughly


@dataclass
class Report:
    """What was found.

    Attributes:
        sizes: (width, height) of every usable sample.
        captions: their lengths in bytes.
        damaged: shard, key and reason of what cannot be used.
        duplicates: shard and key of a sample, and of the earlier one with the same pixels.
        sheet: some pictures, spread over the set, with their captions.
        members: how many samples have which members.
        damaged_shards: name and where.
    """

    sizes: list[tuple[int, int]] = field(default_factory=list)
    captions: list[int] = field(default_factory=list)
    damaged: list[tuple[str, str, str]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    sheet: list[tuple[np.ndarray, str]] = field(default_factory=list)
    members: Counter[str] = field(default_factory=Counter)
    damaged_shards: list[tuple[str, str]] = field(default_factory=list)


def inspect_shards(
    folder: Path, sample_format: SampleFormat, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Decode every sample of a folder of raw shards.

    Raises:
        UserError: the folder has no raw samples with captions.
    """
    samples, report = ShardDataset(folder), Report()
    for kind in samples.index.kinds:
        report.members[", ".join(kind.members)] += kind.samples
    if all(LATENTS in kind.members for kind in samples.index.kinds):
        raise UserError(f"{folder} holds precomputed samples; check the raw shards that they were made from.")
    report.damaged_shards = [(shard.name, shard.damage) for shard in samples.index.shards if shard.damage]
    samples.keep(sample_format.takes, sample_format.needed)
    seen: dict[bytes, str] = {}
    shown = {round(place) for place in np.linspace(0, len(samples) - 1, min(SHEET, len(samples)))}
    for index in range(len(samples)):
        place = f"{samples.shard(index).rsplit('/', 1)[-1]}/{samples.name(index)}"
        try:
            sample = samples.decoded(index)
            image, caption = image_of(sample), sample_format.caption(sample, index)
        except (OSError, ValueError) as error:
            shard, _, key = place.partition("/")
            report.damaged.append((shard, key, str(error)))
        else:
            report.sizes.append((image.shape[2], image.shape[1]))
            report.captions.append(len(caption.encode()))
            digest = hashlib.blake2b(image.tobytes(), digest_size=16, key=str(image.shape).encode()).digest()
            if seen.setdefault(digest, place) != place:
                report.duplicates.append((place, seen[digest]))
            if index in shown:
                report.sheet.append((_thumbnail(image), caption))
        if progress is not None:
            progress(index + 1, len(samples))
    return report


def lines(report: Report) -> list[str]:
    """Return a report as lines of a table."""
    widths, heights = np.array(report.sizes or [(0, 0)]).T
    tokens = np.ceil(widths / PATCH) * np.ceil(heights / PATCH)
    captions = np.array(report.captions or [0])
    rows = [
        ("samples", f"{len(report.sizes)} usable, {len(report.damaged)} not"),
        ("width", _quantiles(widths, "pixels")),
        ("height", _quantiles(heights, "pixels")),
        ("aspect ratio", _quantiles(widths / np.maximum(heights, 1), "width / height")),
        ("caption", _quantiles(captions, "bytes")),
        ("empty captions", str(int((captions == 0).sum()) if report.captions else 0)),
        ("same pixels", f"{len(report.duplicates)} samples repeat an earlier one"),
        (
            "tokens",
            f"about {tokens.sum():.4g} of pictures at full size ({PATCH} pixels a side), "
            f"{captions.sum() / BYTES_PER_TOKEN:.4g} of text",
        ),
        *(("members", f"{count} samples with {names}") for names, count in report.members.most_common(8)),
        *(("damaged shard", f"{name}: {damage}") for name, damage in report.damaged_shards[:8]),
        *(("not usable", f"{shard}: {key}: {reason}") for shard, key, reason in report.damaged[:8]),
        *(("same pixels", f"{place} and {earlier}") for place, earlier in report.duplicates[:8]),
    ]
    return [f"{name:<15}{value}" for name, value in rows]


def _quantiles(values: np.ndarray, unit: str) -> str:
    least, low, middle, high, most = (f"{value:.4g}" for value in np.quantile(values, [0, 0.1, 0.5, 0.9, 1]))
    return f"{least} to {most} {unit}; a tenth below {low}, half below {middle}, a tenth above {high}"


def write_report(report: Report, out: Path) -> None:
    """Write the table, histograms, a contact sheet, and a line of JSON for everything that is not usable."""
    durable.require_empty(out, "The output")
    with durable.building(out) as building:
        (building / "report.txt").write_text("".join(f"{line}\n" for line in lines(report)))
        bad = [{"shard": shard, "key": key, "reason": reason} for shard, key, reason in report.damaged]
        (building / "bad_samples.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in bad))
        if report.sheet:
            _draw_histograms(report, building / "histograms.png")
            images, captions = zip(*report.sheet, strict=True)
            (building / "sheet.png").write_bytes(png(labelled_grid(np.stack(images), list(captions))))


def _thumbnail(image: np.ndarray) -> np.ndarray:
    """Return uint8 [3, H, W] as a square [THUMBNAIL, THUMBNAIL, 3] with white beside it."""
    picture = Image.fromarray(image.transpose(1, 2, 0))
    return np.asarray(ImageOps.pad(picture, (THUMBNAIL, THUMBNAIL), color="white"))


def _draw_histograms(report: Report, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    widths, heights = np.array(report.sizes).T
    figure = Figure(figsize=(12, 3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 4)
    drawn = {
        "shorter side (pixels)": np.minimum(widths, heights),
        "longer side (pixels)": np.maximum(widths, heights),
        "log2(width / height)": np.log2(widths / heights),
        "caption (bytes)": np.array(report.captions),
    }
    for panel, (name, values) in zip(panels, drawn.items(), strict=True):
        panel.hist(values, bins=40)
        panel.set_xlabel(name)
    panels[0].set_ylabel("samples")
    figure.savefig(path, format="png", dpi=100)
