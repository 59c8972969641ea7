"""Results side by side: the paired test against all exchanges of signs, the table, and files of others."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.comparison.compare import group_by_benchmark
from rmoe_megatron.evaluation.comparison.published import ROWS
from rmoe_megatron.evaluation.comparison.result_files import METRICS, read_entries
from rmoe_megatron.evaluation.comparison.significance import compare_by_prompt
from tests.support.commands import rmoe

FIRST = {
    "colors": {"red": 0.25, "blue": 0.5, "green": 1.0},
    "counting": {"two": 0.0, "three": 0.5, "four": 0.25},
}
SECOND = {
    "colors": {"red": 0.5, "blue": 0.5, "green": 0.75},
    "counting": {"two": 0.75, "three": 1.0, "four": 0.5},
}


def write(folder: Path, **more: Any) -> Path:
    folder.mkdir(parents=True)
    results = {
        "benchmark": "GenEval", "protocol": "official", "overall": 0.5, "standard_error": 0.01, "tasks": {"colors": 0.5},
        "differences": [],
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results | more))
    return folder


def test_the_difference_is_tested_by_exchanging_each_prompts_scores() -> None:
    found = compare_by_prompt(SECOND, FIRST)
    assert found is not None
    # Of colours +1/4, 0 and -1/4; of counts +3/4, +1/2 and +1/4. Each task counts by its mean.
    steps = np.array([0.25, 0.0, -0.25, 0.75, 0.5, 0.25]) / 6
    assert found.difference == pytest.approx(steps.sum())
    sums = [np.dot(signs, steps) for signs in itertools.product((1, -1), repeat=6)]
    assert found.p_value == pytest.approx(np.mean(np.abs(sums) >= steps.sum() - 1e-12))
    # Variances of 1/16 in both tasks, of their means 1/48.
    assert found.standard_error == pytest.approx(np.sqrt(1 / 48 + 1 / 48) / 2)
    assert (found.prompts, found.left_out) == (6, 0)
    assert not found.exceeds_error


def test_many_prompts_tell_a_small_difference_from_chance() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(400)
    one = {"all": {str(number): float(score) for number, score in enumerate(base)}}
    for shift, exceeds in ((0.0, False), (0.02, True)):
        moved = base + shift + rng.normal(0, 0.05, 400)
        other = {"all": {str(number): float(score) for number, score in enumerate(moved)}}
        found = compare_by_prompt(other, one)
        assert found is not None
        assert found.exceeds_error is exceeds
        # Far less than the error of either score: the prompts are the same.
        assert found.standard_error == pytest.approx(0.05 / 20, rel=0.15)


def test_prompts_that_one_does_not_have_are_counted() -> None:
    found = compare_by_prompt({"colors": {"red": 1.0, "pink": 0.0}}, FIRST)
    assert found is not None
    assert (found.prompts, found.left_out, found.difference, found.standard_error) == (1, 6, 0.75, None)
    assert compare_by_prompt({"verbs": {"run": 1.0}}, FIRST) is None


def test_what_cannot_be_paired_says_why(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a", prompt_scores=FIRST),
        write(tmp_path / "fixed", prompt_scores=FIRST, protocol="fixed"),
        write(tmp_path / "old"),
    ]
    (group,) = group_by_benchmark([entry for path in paths for entry in read_entries(path)])
    assert group.differences == [None, None, None]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "valid dictionary"),
        ('{"benchmark": "chess", "overall": 1}', 'the benchmark "chess"; known are GenEval'),
        ('{"benchmark": "GenEval", "overall": "much"}', 'overall "much", which is no number'),
        ('{"benchmark": "GenEval", "overall": 1, "prompt_scores": [1]}', "prompt_scores .* no groups"),
        ('{"benchmark": "GenEval", "overall": 1, "prompt_scores": {"a": {"b": null}}}', "no number"),
        ('{"benchmark": "toy shapes"}', "splits null"),
    ],
)
def test_results_of_others(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=words):
        read_entries(tmp_path)
    with pytest.raises(UserError, match="There is no .*nothing"):
        read_entries(tmp_path / "nothing")


def test_published_rows_have_a_source_and_the_unit_of_results() -> None:
    for row in ROWS:
        assert any(place in row.source for place in ("arXiv", "github.com", "github.io"))
        limit = 1 if row.benchmark == "GenEval" else 100
        assert row.benchmark in METRICS
        assert 0 < row.score < limit
        rounding = {"GenEval": 0.01, "T2I-CoReBench": 0.1}.get(row.benchmark)
        if rounding is not None and row.parts:  # the mean of the parts, all of which are rounded
            assert row.score == pytest.approx(np.mean(list(row.parts.values())), abs=rounding)
    named = " ".join(row.model for row in ROWS)
    for model in (
        "SD3-medium",
        "SD3.5-medium",
        "SD3.5-large",
        "FLUX.1-dev",
        "SDXL",
        "PixArt-alpha",
        "SANA",
        "Nucleus-Image",
    ):
        assert model in named
    assert {"Nucleus-Image", "DiT-XL/2", "SiT-XL/2"} <= {row.model.partition(",")[0] for row in ROWS}


def test_the_command(tmp_path: Path) -> None:
    first = write(
        tmp_path / "base", prompt_scores=FIRST, overall=0.4167, tasks={"colors": 0.5833, "counting": 0.25}
    )
    second = write(tmp_path / "ours", prompt_scores=SECOND, overall=0.6667, differences=["another detector"])
    shapes = {
        "benchmark": "toy shapes",
        "splits": {"seen": {"overall": 0.5, "standard_error": None, "skills": {"single": 0.5}}},
    }
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "results.json").write_text(json.dumps(shapes))
    code, errors = rmoe(
        "eval",
        "compare",
        str(first),
        str(second / "results.json"),
        str(tmp_path / "toy"),
        "--out",
        str(tmp_path / "out"),
    )
    assert code == 0, errors
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert lines[0].startswith("| GenEval | score | difference | p | exceeds its error | colors | counting |")
    ours = next(line for line in lines if "/ours" in line)
    assert "| 0.6667 ± 0.0100 | +0.2500 ± 0.1021 | 0.2500 | no |" in ours
    assert f"- {second}: another detector" in lines
    assert any(
        line.startswith("| FLUX.1-dev | 0.6600 |")
        and line.endswith("| README of github.com/HiDream-ai/HiDream-I1 |")
        for line in lines
    )
    assert any(line.startswith("| toy shapes, seen |") for line in lines)
    groups = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [group["benchmark"] for group in groups] == ["GenEval", "toy shapes, seen"]
    assert groups[0]["results"][1]["difference"]["exceeds_error"] is False
    with Image.open(tmp_path / "out" / "comparison.png") as picture:
        assert picture.width > 600
    code, errors = rmoe("eval", "compare", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    assert code == 2
    assert "There is no" in errors
