"""tools/outdated_pins.py: which pins are behind, and what holds them back."""

from pathlib import Path

import outdated_pins
import pytest
from outdated_pins import Outdated, outdated, read_pins
from packaging.requirements import Requirement

PINS = "# a comment\nalpha==1.0\nBeta_Part==2.0.1\ngamma==3.0\n"
REQUIREMENTS = [
    ("rmoe-megatron", Requirement("alpha>=1,<1.1")),
    ("rmoe-megatron", Requirement("beta-part>=1")),
    ("delta", Requirement("beta-part<2.1")),
    ("delta", Requirement("alpha>=1")),
    ("epsilon", Requirement("beta.part==2.0.*")),
]


@pytest.fixture
def pins(tmp_path: Path) -> Path:
    path = tmp_path / "constraints.txt"
    path.write_text(PINS)
    return path


def test_what_is_behind_is_listed_with_what_holds_it(pins: Path) -> None:
    newest = {"alpha": "1.2", "beta-part": "2.1", "not-pinned": "9"}
    assert outdated(read_pins(pins), newest, REQUIREMENTS) == [
        Outdated("alpha", "1.0", "1.2", ["rmoe-megatron asks for <1.1,>=1"]),
        Outdated("beta-part", "2.0.1", "2.1", ["delta asks for <2.1", "epsilon asks for ==2.0.*"]),
    ]


@pytest.mark.parametrize(
    ("newest", "code", "words"),
    [
        (
            {"alpha": "1.2", "beta-part": "2.1"},
            1,
            "2 pins are behind; 1 that pyproject.toml asks for could move: alpha.",
        ),
        ({"beta-part": "2.1"}, 0, "1 pins are behind; 0 that pyproject.toml asks for could move: none."),
        ({}, 0, "0 pins are behind; 0 that pyproject.toml asks for could move: none."),
    ],
)
def test_the_exit_code_says_whether_one_could_move(
    pins: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    newest: dict[str, str],
    code: int,
    words: str,
) -> None:
    monkeypatch.setattr(outdated_pins, "CONSTRAINTS", pins)
    monkeypatch.setattr(outdated_pins, "newest_releases", lambda: newest)
    monkeypatch.setattr(outdated_pins, "installed_requirements", lambda: REQUIREMENTS)
    assert outdated_pins.main() == code
    assert words in capsys.readouterr().out


def test_requirements_are_followed_through_extras() -> None:
    """PyTorch asks for a part of the CUDA toolkit by an extra of it, this project for PyTorch and, in its dev extra, for pytest."""
    found = {(name, str(requirement.name)) for name, requirement in outdated_pins.installed_requirements()}
    assert {("rmoe-megatron", "torch"), ("rmoe-megatron", "pytest"), ("torch", "sympy")} <= found
    assert ("rmoe-megatron", "transformer-engine") not in found
