"""What the GPU checks have found: results, goals, and the files that hold them."""

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from gpu_check_workplace import Figures

# Speeds in the table of tools/benchmark_results.md: check, place among its sizes, column.
SPEEDS = [
    ("speed_dense", 0, "dense, 512"),
    ("speed_dense", 1, "dense, 1024"),
    ("speed_dense_compiled", 0, "dense compiled, 1024"),
    ("speed_m2_t2", 0, "M=2, T=2, 512"),
    ("speed_m2_t2", 1, "M=2, T=2, 1024"),
    ("speed_m5_t5", 0, "M=5, T=5, 512"),
    ("speed_m5_t5", 1, "M=5, T=5, 1024"),
]
COLUMNS = [
    "device", "torch", "Transformer Engine", *(column for _, _, column in SPEEDS), "FP8 / bf16", "diffusers / ours",
    "waits a step",
]  # fmt: skip
# What the ledger calls them.
FIGURES = [
    "device", "torch", "transformer_engine", "dense_512", "dense_1024", "compiled_1024", "m2_512", "m2_1024", "m5_512", "m5_1024",
    "fp8", "diffusers_over_ours", "waits",
]  # fmt: skip


@dataclass
class Result:
    """What became of a check."""

    name: str
    status: str  # ok, skipped or failed
    seconds: float
    reason: str | None = None  # of a check that is not ok, one line
    traceback: str | None = None  # of a failed one
    figures: Figures = field(default_factory=dict)


Found = dict[str, Figures]  # the figures of the checks that are ok, by name


@dataclass(frozen=True)
class Goal:
    """A bound on one figure.

    Args:
        figure: reads it from what was found; None where it was not measured.
    """

    name: str
    bound: float
    at_least: bool
    figure: Callable[[Found], float | None]

    @property
    def wanted(self) -> str:
        """Return the bound in words."""
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g}"


@dataclass
class Verdict:
    """What was measured of a goal."""

    goal: str
    wanted: str
    measured: float | None
    verdict: str  # met, not met or not measured


def _mfu(found: Found) -> float | None:
    sizes = [found[name]["sizes"][-1] for name in ("speed_dense", "speed_dense_compiled") if name in found]
    return max((size["mfu"] for size in sizes if size["mfu"] is not None), default=None)


def _fp8(found: Found) -> float | None:
    speeds = (figures["speed_over_bf16"] for name, figures in found.items() if name.startswith("fp8_"))
    return max(speeds, default=None)


def _recursion(found: Found) -> float | None:
    ratios = [
        value
        for figures in found.values()
        for name, value in figures.items()
        if name.startswith("time_over_flops")
    ]
    return max(ratios, default=None)


def _diffusers(found: Found) -> float | None:
    return found.get("diffusers_compiled", {}).get("diffusers_over_ours")


GOALS = [
    Goal("MFU of dense SD3-medium at 1024 pixels, bf16, compiled or not", 0.5, True, _mfu),
    Goal("speed of the fastest FP8 recipe over bf16's", 1.3, True, _fp8),
    Goal("time of recursion over what its FLOPs predict, at worst", 1.1, False, _recursion),
    Goal("time of diffusers' compiled step over ours compiled", 1.3, True, _diffusers),
]


def judge(goals: Sequence[Goal], found: Found, small: bool) -> list[Verdict]:
    """Hold what was found to the goals, which are SD3-medium's: tiny models say nothing about them."""
    verdicts = []
    for goal in goals:
        measured = None if small else goal.figure(found)
        if measured is None:
            verdict = "not measured"
        else:
            met = measured >= goal.bound if goal.at_least else measured <= goal.bound
            verdict = "met" if met else "not met"
        verdicts.append(Verdict(goal.name, goal.wanted, measured, verdict))
    return verdicts


def environment(device: torch.device) -> dict[str, str | None]:
    """Return device and versions."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "megatron_core": _version("megatron-core"),
        "transformer_engine": _version("transformer-engine"),
        "diffusers": _version("diffusers"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass
class Report:
    """All that a run of the checks has to say."""

    environment: dict[str, str | None]
    small: bool
    results: list[Result]

    @property
    def found(self) -> Found:
        """Return the figures of the checks that are ok."""
        return {each.name: each.figures for each in self.results if each.status == "ok"}

    @property
    def verdicts(self) -> list[Verdict]:
        """Return the goals and what became of them."""
        return judge(GOALS, self.found, self.small)

    def json(self) -> str:
        """Return everything as JSON."""
        content: dict[str, Any] = {
            "environment": self.environment,
            "small": self.small,
            "results": [asdict(each) for each in self.results],
            "goals": [asdict(each) for each in self.verdicts],
        }
        return json.dumps(content, indent=1) + "\n"

    def row(self) -> list[str]:
        """Return the cells of :data:`COLUMNS`; what was not measured is a dash."""
        found = self.found
        speeds = [
            _speed_cell(found[check]["sizes"][place] if check in found else None)
            for check, place, _ in SPEEDS
        ]
        waits = found.get("synchronisations", {}).get("count")
        return [
            f"{self.environment['device']}{', tiny models' if self.small else ''}",
            self.environment["torch"] or "-",
            self.environment["transformer_engine"] or "-",
            *speeds,
            _ratio(_fp8(found)),
            _ratio(_diffusers(found)),
            "-" if waits is None else str(waits),
        ]

    def markdown(self) -> str:
        """Return the row for the results file with its header, the goals, the checks, and the dearest operations."""
        parts = [table(COLUMNS, [self.row()]), self.goals_table()]
        rows = [
            [each.name, each.status, f"{each.seconds:.1f}", each.reason or _summary(each.figures)]
            for each in self.results
        ]
        parts.append(table(["check", "result", "seconds", "found"], rows))
        operations = self.found.get("timeline", {}).get("operations", [])
        if operations:
            rows = [
                [f"`{each['name'][:90]}`", str(each["calls"]), f"{each['seconds'] * 1e3:.2f}"]
                for each in operations
            ]
            parts.append(table(["operation", "calls", "ms of the device"], rows))
        return "\n".join(parts)

    def goals_table(self) -> str:
        """Return the goals as a table."""
        rows = [[each.goal, each.wanted, _ratio(each.measured), each.verdict] for each in self.verdicts]
        return table(["goal", "wanted", "measured", "verdict"], rows)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Return a markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    # A bar would start another cell.
    return "".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |\n" for line in lines)


def _speed_cell(size: Figures | None) -> str:
    if size is None:
        return "-"
    parts = [f"{size['batch'] / size['seconds']:.2f} samples/s"]
    parts += [f"{100 * size['mfu']:.1f} % MFU"] if size["mfu"] is not None else []
    parts += [f"{size['peak_gb']:.0f} GB"] if size["peak_gb"] is not None else []
    return ", ".join(parts)


def _summary(figures: Figures) -> str:
    """Return the figures that are single numbers or words."""
    pairs = {name: value for name, value in figures.items() if isinstance(value, int | float | str)}
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in pairs.items()
    )


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
