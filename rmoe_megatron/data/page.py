"""A page to look at a folder of raw shards: ``rmoe data show``. It is one HTML file, which loads nothing from elsewhere."""

from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from rmoe_megatron.data.report import Report, Shown, draw_histograms, lines
from rmoe_megatron.data.shards.bucketing import NO_BUCKET, TOO_SMALL, Bucketing
from rmoe_megatron.data.shards.index import LEFT_OUT
from rmoe_megatron.data.training_dataset import SampleFormat
from rmoe_megatron.files import atomic
from rmoe_megatron.files.images import embedded, png

SHOWN = 100  # samples
LISTED = 200  # entries of a list, at most
STYLE = """
body { font-family: sans-serif; margin: 2em; max-width: 90em }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(12em, 1fr)); gap: 1em }
figure { margin: 0 } figure img { width: 100%; background: white; border: 1px solid #ccc }
figcaption { font-size: 80%; overflow-wrap: anywhere } small { color: #555 } .cut { color: #b00 }
pre { overflow-x: auto } li { overflow-wrap: anywhere }
"""


def write_page(
    report: Report, path: Path, folder: Path, sample_format: SampleFormat, text_length: int | None
) -> None:
    """Write the page of a folder of shards.

    Args:
        sample_format: with a bucketing if it is known what size the model takes.
        text_length: tokens that the model takes of a caption; None if it is not known.
    """
    title = f"{len(report.sizes)} samples of {folder}"
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>",
        f"<pre>{escape(chr(10).join(lines(report)))}</pre>",
    ]
    if report.sizes:
        parts.append(f"<img src='{embedded(draw_histograms(report))}' alt='histograms'>")
    if text_length is not None:
        parts.append(f"<h2>Captions and text_length</h2><p>{escape(_against(report, text_length))}</p>")
    parts.append(f"<h2>Left out</h2>{_listed(left_out(report, sample_format), 'Nothing is left out.')}")
    same = [f"{place} has the pixels of {earlier}" for place, earlier in report.duplicates]
    parts.append(f"<h2>Duplicates</h2>{_listed(same, 'No two samples have the same pixels.')}")
    figures = "".join(_figure(each, text_length) for each in report.sheet)
    parts.append(f"<h2>{len(report.sheet)} samples</h2><div class=samples>{figures}</div></html>")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, "\n".join(parts) + "\n")


def _against(report: Report, text_length: int) -> str:
    """Return in words how many captions are longer than the model takes."""
    tokens = np.array(report.tokens)
    cut, count = int((tokens > text_length).sum()), max(len(tokens), 1)
    return f"{cut} of {len(tokens)} captions ({cut / count:.1%}) have more than {text_length} tokens; what is beyond them is cut."


def left_out(report: Report, sample_format: SampleFormat) -> list[str]:
    """Return what training leaves out, and why, as sentences."""
    told = []
    for names, count in report.lacking.most_common():
        if LEFT_OUT in names:
            told.append(f"{count} samples: the filter does not take them")
        else:
            told.append(f"{count} samples have only {names}; {sample_format.needed} are needed")
    told += _by_size(
        np.array(report.sizes, dtype=np.int64).reshape(-1, 2), sample_format.bucketing, sample_format.divides
    )
    told += [f"{shard}, sample {key}: {reason}" for shard, key, reason in report.damaged]
    return told + [f"{shard} is damaged: {damage}" for shard, damage in report.damaged_shards]


def _by_size(sizes: np.ndarray, bucketing: Bucketing | None, divides: bool) -> list[str]:
    """Return how many pictures are too small for a model, or of no bucket; sizes are [samples, 2]."""
    if bucketing is None or not len(sizes):
        return []
    widths, heights = sizes.T
    if divides:
        numbers = bucketing.assign(widths, heights)
        small, none = int((numbers == TOO_SMALL).sum()), int((numbers == NO_BUCKET).sum())
    else:
        (bucket,) = bucketing.buckets
        small, none = int(((widths < bucket.width) | (heights < bucket.height)).sum()), 0
        small = 0 if bucketing.upscale else small
    buckets = ", ".join(map(str, bucketing.buckets))
    told = (
        [f"{small} pictures are smaller than the model's {buckets} (data.upscale=true enlarges them)"]
        if small
        else []
    )
    return told + ([f"{none} pictures are of none of the buckets {buckets}"] if none else [])


def _listed(entries: list[str], nothing: str) -> str:
    if not entries:
        return f"<p>{escape(nothing)}</p>"
    more = [f"and {len(entries) - LISTED} more"] if len(entries) > LISTED else []
    return "<ul>" + "".join(f"<li>{escape(each)}</li>" for each in entries[:LISTED] + more) + "</ul>"


def _figure(sample: Shown, text_length: int | None) -> str:
    width, height = sample.size
    said = f"{width} x {height}, {width / height:.2f}"
    if sample.tokens is not None:
        said += f", {sample.tokens} tokens"
    is_cut = text_length is not None and sample.tokens is not None and sample.tokens > text_length
    return (
        f"<figure><img loading=lazy src='{embedded(png(Image.fromarray(sample.thumbnail)))}' alt=''>"
        f"<figcaption{' class=cut' if is_cut else ''}>{escape(sample.caption)}<br>"
        f"<small>{escape(sample.place)}<br>{escape(said)}</small></figcaption></figure>"
    )
