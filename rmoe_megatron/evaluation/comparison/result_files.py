"""Results of this package's evaluations, read back from their ``results.json``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from pydantic import Field, TypeAdapter, with_config

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.comparison.significance import PromptScores
from rmoe_megatron.evaluation.early_checks import results_file
from rmoe_megatron.files.untrusted import OPEN, read_json, shown

Name = Annotated[str, Field(min_length=1, max_length=200)]


@with_config(OPEN)
class Results(TypedDict):
    """What all results have."""

    benchmark: Name
    protocol: NotRequired[Name]
    differences: NotRequired[list[str]]


@dataclass(frozen=True)
class Metric:
    """A benchmark's main number: what the results call it, its digits, and what its parts are called."""

    name: str
    digits: int
    parts: tuple[str, ...] = ()  # a key whose values are the parts, or several keys that are parts themselves
    lower_is_better: bool = False


METRICS = {
    "GenEval": Metric("overall", 4, ("tasks",)),
    "GenEval 2": Metric("soft_tifa_gm", 2, ("skills_am",)),
    "DPG-Bench": Metric("overall", 2, ("categories_l1",)),
    "T2I-CoReBench": Metric("overall", 2, ("dimensions",)),
    "ImageNet 256": Metric(
        "fid", 2, ("sfid", "inception_score", "precision", "recall"), lower_is_better=True
    ),
    "PickScore": Metric("score", 3),
    "HPSv3": Metric("score", 3),
    "toy shapes": Metric("overall", 3, ("skills",)),
}


@dataclass(frozen=True)
class Entry:
    """One model's score in one benchmark.

    Attributes:
        parts: scores of tasks, skills or categories.
        prompt_scores: by task and prompt; None where results do not have them.
        notes: what the score differs in from published ones.
    """

    name: str
    benchmark: str
    protocol: str
    score: float
    error: float | None
    parts: dict[str, float]
    prompt_scores: PromptScores | None
    notes: tuple[str, ...]


def read_entries(path: Path) -> list[Entry]:
    """Return what a ``results.json``, or the folder that it is in, says; the toy benchmark has an entry for every split.

    Raises:
        UserError: there is none, or it holds no results of a benchmark that is known here.
    """
    file = results_file(path)
    results: dict[str, Any] = dict(read_json(file, TypeAdapter(Results)))
    if results["benchmark"] not in METRICS:
        raise UserError(
            f"{file} is of the benchmark {shown(results['benchmark'])}; known are {', '.join(METRICS)}."
        )
    if results["benchmark"] != "toy shapes":
        return [_entry(results, results["benchmark"], file)]
    return [
        _entry({**results, **split}, f"toy shapes, {name}", file)
        for name, split in _sections(results, "splits", file).items()
    ]


def _entry(results: dict[str, Any], benchmark: str, file: Path) -> Entry:
    metric = METRICS[results["benchmark"]]
    notes = tuple(results.get("differences", []))
    if results.get("limited") is not None:
        limited = _sections(results, "limited", file, of_numbers=True)
        results = {**results, **limited}
        notes = (
            f"{limited.get('prompts')} of {limited.get('of')} prompts: not the benchmark's score",
            *notes,
        )
    error = results.get("standard_error")
    if len(metric.parts) == 1:
        parts = _numbers(results.get(metric.parts[0], {}), metric.parts[0], file)
    else:
        parts = {name: _number(results, name, file) for name in metric.parts}
    scores = results.get("prompt_scores")
    return Entry(
        name=str(file.parent),
        benchmark=benchmark,
        protocol=results.get("protocol", "official"),
        score=_number(results, metric.name, file),
        error=None if error is None else _number(results, "standard_error", file),
        parts=parts,
        prompt_scores=None if scores is None else {
            task: _numbers(each, f"prompt_scores of {task}", file)
            for task, each in _sections(results, "prompt_scores", file).items()
        },
        notes=notes,
    )  # fmt: skip


def _number(results: dict[str, Any], name: str, file: Path) -> float:
    value = results.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{file} has {name} {shown(value)}, which is no number; evaluate again.")
    return float(value)


def _numbers(values: object, name: str, file: Path) -> dict[str, float]:
    if not isinstance(values, dict):
        raise UserError(f"{file} has {name} {shown(values)}, which are no scores; evaluate again.")
    return {key: _number(values, key, file) for key in values}


def _sections(results: dict[str, Any], name: str, file: Path, of_numbers: bool = False) -> dict[str, Any]:
    values = results.get(name)
    if not isinstance(values, dict) or not (
        of_numbers or all(isinstance(each, dict) for each in values.values())
    ):
        raise UserError(f"{file} has {name} {shown(values)}, which are no groups of scores; evaluate again.")
    return values
