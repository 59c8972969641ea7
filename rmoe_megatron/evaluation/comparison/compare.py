"""One table and one plot of several results: the first is what the others are compared with, prompt by prompt."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rmoe_megatron.evaluation.comparison.published import ROWS, Published
from rmoe_megatron.evaluation.comparison.result_files import METRICS, Entry, Metric, read_entries
from rmoe_megatron.evaluation.comparison.significance import PairedDifference, compare_by_prompt
from rmoe_megatron.evaluation.results import markdown_table
from rmoe_megatron.files import atomic


@dataclass(frozen=True)
class Group:
    """The results of one benchmark, how each differs from the first, and what is published."""

    benchmark: str
    entries: list[Entry]
    differences: list[PairedDifference | None]  # of every entry from the first, whose own is None
    published: list[Published]

    @property
    def metric(self) -> Metric:
        """Return what the benchmark's main number is."""
        return METRICS[self.benchmark.partition(",")[0]]


def compare(paths: Sequence[Path], out: Path) -> str:
    """Write ``comparison.md``, ``comparison.json`` and ``comparison.png`` to ``out``; returns the table.

    Args:
        paths: of results, or of folders that they are in; of each benchmark the first is what the others are compared with.

    Raises:
        UserError: a file holds no results.
    """
    groups = group_by_benchmark([entry for path in paths for entry in read_entries(path)])
    text = "\n".join(table(group) for group in groups)
    described = json.dumps([_described(group) for group in groups], indent=1) + "\n"
    with atomic.filling(out):
        atomic.write(out / "comparison.png", plot(groups))
        atomic.write(out / "comparison.json", described)
        atomic.write(out / "comparison.md", text)
    return text


def group_by_benchmark(entries: Sequence[Entry]) -> list[Group]:
    """Return the entries by benchmark, in the order of their first, each with its difference from that."""
    groups = []
    for benchmark in dict.fromkeys(entry.benchmark for entry in entries):
        same = [entry for entry in entries if entry.benchmark == benchmark]
        published = [row for row in ROWS if row.benchmark == benchmark]
        groups.append(
            Group(benchmark, same, [None, *(_difference(each, same[0]) for each in same[1:])], published)
        )
    return groups


def _difference(entry: Entry, first: Entry) -> PairedDifference | None:
    """Return how an entry differs from the first, None where prompts or rules are not the same."""
    if entry.prompt_scores is None or first.prompt_scores is None or entry.protocol != first.protocol:
        return None
    return compare_by_prompt(entry.prompt_scores, first.prompt_scores)


def table(group: Group) -> str:
    """Return a group as a Markdown table with notes below it."""
    scored = [*(entry.parts for entry in group.entries), *(row.parts for row in group.published)]
    parts = list(dict.fromkeys(name for each in scored for name in each))
    digits = group.metric.digits
    header = [group.benchmark, "score", "difference", "p", "exceeds its error", *parts, "source"]
    rows, notes = [], list[str]()
    for entry, difference in zip(group.entries, group.differences, strict=True):
        error = "" if entry.error is None else f" ± {entry.error:.{digits}f}"
        shown = [f"{entry.parts[name]:.{digits}f}" if name in entry.parts else "-" for name in parts]
        said = _said(difference, digits) if entry is not group.entries[0] else ["-", "-", "first"]
        name = f"{entry.name} ({entry.protocol})"
        rows.append([name, f"{entry.score:.{digits}f}{error}", *said, *shown, "measured"])
        notes += [f"- {entry.name}: {note}" for note in entry.notes]
        if difference is not None and difference.left_out:
            notes.append(
                f"- {entry.name}: compared over the {difference.prompts} prompts that both have; {difference.left_out} are in one only"
            )
        elif entry is not group.entries[0] and difference is None:
            notes.append(f"- {entry.name}: no difference by prompt ({_why_not(entry, group.entries[0])})")
    for row in group.published:
        shown = [f"{row.parts[name]:.{digits}f}" if name in row.parts else "-" for name in parts]
        rows.append([row.model, f"{row.score:.{digits}f}", "", "", "", *shown, row.source])
    return markdown_table(header, rows) + ("\n" + "\n".join(notes) + "\n" if notes else "")


def _said(difference: PairedDifference | None, digits: int) -> list[str]:
    if difference is None:
        return ["-", "-", "not known"]
    error = "" if difference.standard_error is None else f" ± {difference.standard_error:.{digits}f}"
    verdict = "yes" if difference.exceeds_error else "no"
    return [f"{difference.difference:+.{digits}f}{error}", f"{difference.p_value:.4f}", verdict]


def _why_not(entry: Entry, first: Entry) -> str:
    if entry.protocol != first.protocol:
        return f"protocol {entry.protocol}, not {first.protocol}"
    if entry.prompt_scores is None or first.prompt_scores is None:
        return "results without prompt_scores"
    return "no prompt in common"


def _described(group: Group) -> dict[str, object]:
    return {
        "benchmark": group.benchmark,
        "results": [
            {
                "name": entry.name, "protocol": entry.protocol, "score": entry.score, "standard_error": entry.error,
                "parts": entry.parts, "differences_from_published": entry.notes,
                "difference": None if difference is None
                else asdict(difference) | {"exceeds_error": difference.exceeds_error},
            }
            for entry, difference in zip(group.entries, group.differences, strict=True)
        ],
        "published": [asdict(row) for row in group.published],
    }  # fmt: skip


def plot(groups: Sequence[Group]) -> bytes:
    """Draw the scores of every benchmark as bars with their standard errors, published ones in grey; returns a PNG."""
    from matplotlib.figure import Figure

    height = sum(len(group.entries) + len(group.published) + 2 for group in groups)
    figure = Figure(figsize=(9, 1 + 0.3 * height), layout="constrained")
    ratios = [len(group.entries) + len(group.published) + 1 for group in groups]
    for axes, group in zip(
        figure.subplots(len(groups), 1, squeeze=False, height_ratios=ratios)[:, 0], groups, strict=True
    ):
        names = [each.name for each in group.entries] + [row.model for row in group.published]
        scores = [each.score for each in group.entries] + [row.score for row in group.published]
        errors = [each.error or 0.0 for each in group.entries] + [0.0] * len(group.published)
        colors = ["tab:blue"] * len(group.entries) + ["lightgrey"] * len(group.published)
        axes.barh(range(len(names)), scores, xerr=errors, color=colors, capsize=3)
        axes.set_yticks(range(len(names)), names, fontsize="small")
        axes.invert_yaxis()
        better = " (lower is better)" if group.metric.lower_is_better else ""
        axes.set_title(f"{group.benchmark}{better}", loc="left")
        axes.grid(axis="x", alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
