"""What a folder of raw shards holds, in numbers and pictures: ``rmoe data check``."""

import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from rmoe_megatron.data.shards.build_index import open_index
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.data.shards.index import LATENTS, LEFT_OUT
from rmoe_megatron.data.storage.store import LocalStore
from rmoe_megatron.data.training_dataset import SampleFormat, image_of
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.images import labelled_grid, png

SHEET = 64  # pictures
SPAN = 256  # samples that a process looks at before it says what it has found
SHARDS_PER_PROCESS = 8  # to scan, at least: a process takes seconds to begin
THUMBNAIL = 128  # pixels
PATCH = 16  # pixels a side that become one token of SD3: an autoencoder of factor 8 and patches of 2
BYTES_PER_TOKEN = 4  # of English captions, roughly


@dataclass(frozen=True)
class Shown:
    """A sample to look at.

    Attributes:
        place: shard and key.
        thumbnail: uint8 [THUMBNAIL, THUMBNAIL, 3], white beside the picture.
        size: width and height of the picture itself.
        tokens: how many tokens its caption has; None if they are not counted.
    """

    place: str
    thumbnail: np.ndarray
    caption: str
    size: tuple[int, int]
    tokens: int | None


@dataclass
class Report:
    """What was found.

    Attributes:
        sizes: (width, height) of every usable sample.
        captions: their lengths in bytes.
        tokens: their lengths in tokens, if these are counted.
        damaged: shard, key and reason of what cannot be used.
        digests: a digest of the pixels of every usable sample, with its place.
        duplicates: shard and key of a sample, and of the earlier one with the same pixels.
        sheet: some samples, spread over the set.
        members: how many samples have which members.
        lacking: likewise, of samples that lack a member, so that they are not looked at.
        damaged_shards: name and where.
    """

    sizes: list[tuple[int, int]] = field(default_factory=list)
    captions: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    damaged: list[tuple[str, str, str]] = field(default_factory=list)
    digests: list[tuple[bytes, str]] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    sheet: list[Shown] = field(default_factory=list)
    members: Counter[str] = field(default_factory=Counter)
    lacking: Counter[str] = field(default_factory=Counter)
    damaged_shards: list[tuple[str, str]] = field(default_factory=list)

    def add(self, part: "Report") -> None:
        """Add what was found in the samples that follow."""
        for mine, its in (
            (self.sizes, part.sizes), (self.captions, part.captions), (self.tokens, part.tokens),
            (self.damaged, part.damaged), (self.sheet, part.sheet),
        ):  # fmt: skip
            mine.extend(its)  # type: ignore[arg-type]


# Takes captions and returns how many tokens each has.
CountTokens = Callable[[list[str]], list[int]]


def inspect_shards(
    folder: Path,
    sample_format: SampleFormat,
    progress: Callable[[int, int], None] | None = None,
    processes: int = 1,
    shown: int = SHEET,
    count_tokens: CountTokens | None = None,
) -> Report:
    """Decode every sample of a folder of raw shards.

    Args:
        processes: that look at samples at the same time; what is found does not depend on them.
        shown: how many samples to keep for looking at.
        count_tokens: goes into the processes; None counts no tokens.

    Raises:
        UserError: the folder has no raw samples with captions.
    """
    store = LocalStore(folder)
    open_index(store, sample_format.filter, min(processes, -(-len(store.shards()) // SHARDS_PER_PROCESS)))
    samples, report = _open(folder, sample_format), Report()
    for kind in samples.index.kinds:
        names = ", ".join(kind.members)
        report.members[names] += kind.samples
        if not sample_format.takes(set(kind.members)) or LEFT_OUT in kind.members:
            report.lacking[names] += kind.samples
    report.damaged_shards = [(shard.name, shard.damage) for shard in samples.index.shards if shard.damage]
    chosen = {round(place) for place in np.linspace(0, len(samples) - 1, min(shown, len(samples)))}
    spans = [range(start, min(start + SPAN, len(samples))) for start in range(0, len(samples), SPAN)]
    seen: dict[bytes, str] = {}
    with _looking(folder, samples, sample_format, min(processes, len(spans)), chosen, count_tokens) as look:
        for span, part in zip(spans, look(spans), strict=True):
            report.add(part)
            for digest, place in part.digests:
                if seen.setdefault(digest, place) != place:
                    report.duplicates.append((place, seen[digest]))
            if progress is not None:
                progress(span.stop, len(samples))
    return report


def _open(folder: Path, sample_format: SampleFormat) -> ShardDataset:
    samples = ShardDataset(folder, sample_filter=sample_format.filter)
    if all(LATENTS in kind.members for kind in samples.index.kinds):
        raise UserError(f"{folder} holds precomputed samples; check the raw shards that they were made from.")
    samples.keep(sample_format.takes, sample_format.needed)
    return samples


@contextmanager
def _looking(
    folder: Path, samples: ShardDataset, sample_format: SampleFormat, processes: int, chosen: set[int],
    count_tokens: CountTokens | None,
) -> Iterator[Callable[[list[range]], Iterator[Report]]]:  # fmt: skip
    """Yield what looks at spans of samples, in this process or in others."""
    if processes == 1:
        yield lambda spans: (_inspect(samples, sample_format, span, chosen, count_tokens) for span in spans)
        return
    arguments = (folder, sample_format, chosen, count_tokens)
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin, arguments) as pool:
        yield lambda spans: pool.map(_inspect_here, spans)


_here: list[Any] = []  # of a process of the pool: what it looks at


def _begin(
    folder: Path, sample_format: SampleFormat, chosen: set[int], count_tokens: CountTokens | None
) -> None:
    logging.disable(logging.WARNING)  # the first process has said it
    _here[:] = [_open(folder, sample_format), sample_format, chosen, count_tokens]


def _inspect_here(span: range) -> Report:
    samples, sample_format, chosen, count_tokens = _here
    return _inspect(samples, sample_format, span, chosen, count_tokens)


def _inspect(
    samples: ShardDataset,
    sample_format: SampleFormat,
    span: range,
    chosen: set[int],
    count_tokens: CountTokens | None,
) -> Report:
    """Look at some samples."""
    report, captions, looked_at = Report(), list[str](), list[tuple[int, str, np.ndarray]]()
    for index in span:
        place = f"{samples.shard(index).rsplit('/', 1)[-1]}/{samples.name(index)}"
        try:
            sample = samples.decoded(index)
            image, caption = image_of(sample), sample_format.caption(sample, index)
        except (OSError, ValueError) as error:
            shard, _, key = place.partition("/")
            report.damaged.append((shard, key, str(error)))
            continue
        report.sizes.append((image.shape[2], image.shape[1]))
        report.captions.append(len(caption.encode()))
        digest = hashlib.blake2b(image.tobytes(), digest_size=16, key=str(image.shape).encode()).digest()
        report.digests.append((digest, place))
        if index in chosen:
            looked_at.append((len(captions), place, image))
        captions.append(caption)
    if count_tokens is not None and captions:
        report.tokens = count_tokens(captions)
    for number, place, image in looked_at:
        tokens = report.tokens[number] if report.tokens else None
        report.sheet.append(Shown(place, _thumbnail(image), captions[number], report.sizes[number], tokens))
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
        *([("caption", _quantiles(np.array(report.tokens), "tokens"))] if report.tokens else []),
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
    atomic.require_empty(out, "The output")
    with atomic.building(out) as building:
        (building / "report.txt").write_text("".join(f"{line}\n" for line in lines(report)))
        bad = [{"shard": shard, "key": key, "reason": reason} for shard, key, reason in report.damaged]
        (building / "bad_samples.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in bad))
        if report.sheet:
            (building / "histograms.png").write_bytes(draw_histograms(report))
            images, captions = (
                [each.thumbnail for each in report.sheet],
                [each.caption for each in report.sheet],
            )
            (building / "sheet.png").write_bytes(png(labelled_grid(np.stack(images), captions)))


def _thumbnail(image: np.ndarray) -> np.ndarray:
    """Return uint8 [3, H, W] as a square [THUMBNAIL, THUMBNAIL, 3] with white beside it."""
    picture = Image.fromarray(image.transpose(1, 2, 0))
    return np.asarray(ImageOps.pad(picture, (THUMBNAIL, THUMBNAIL), color="white"))


def draw_histograms(report: Report) -> bytes:
    """Return a PNG file with how often sizes, aspect ratios and lengths of captions are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    widths, heights = np.array(report.sizes).T
    figure, buffer = Figure(figsize=(12, 3), layout="constrained"), io.BytesIO()
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 4)
    drawn = {
        "shorter side (pixels)": np.minimum(widths, heights),
        "longer side (pixels)": np.maximum(widths, heights),
        "log2(width / height)": np.log2(widths / heights),
        "caption (tokens)" if report.tokens else "caption (bytes)": np.array(
            report.tokens or report.captions
        ),
    }
    for panel, (name, values) in zip(panels, drawn.items(), strict=True):
        panel.hist(values, bins=40)
        panel.set_xlabel(name)
    panels[0].set_ylabel("samples")
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
