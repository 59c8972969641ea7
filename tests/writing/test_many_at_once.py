"""Several starts of the same command at once, as an array that was submitted twice or a second shell make them."""

import re
from pathlib import Path

import pytest

from rmoe_megatron.checkpoint.folders import list_checkpoints, verify
from tests.support.commands import finish, start
from tests.support.writing_commands import COMMANDS, leftovers, prepare, result

# What those may say that do not make it: who is at it, or that it is there.
REASONS = (
    r"is being (made|written) by process \d+ on \S+; wait for its end",
    r"is in use by (process \d+ on|another process)",
    r"exists and is not an empty folder",
    r"already holds checkpoints",
)


@pytest.mark.parametrize("starts", [3, pytest.param(12, marks=pytest.mark.distributed_full)])
@pytest.mark.parametrize("command", COMMANDS)
def test_one_makes_it_and_the_others_say_who(
    command: str, starts: int, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    arguments = prepare(here, command)
    code, errors = finish(start(arguments))
    assert code == 0, errors
    alone = result(here / "w")
    prepare(here, command)
    ended = [finish(process) for process in [start(arguments) for _ in range(starts)]]
    assert any(code == 0 for code, _ in ended), ended
    for code, said in ended:
        assert "Traceback" not in said
        sentences = [line for line in said.splitlines() if line.startswith("error: ")]
        assert (code, len(sentences)) in ((0, 0), (2, 1)), said
        assert all(any(re.search(reason, each) for reason in REASONS) for each in sentences), sentences
    assert leftovers(here / "w") == []
    found = result(here / "w")
    assert found.keys() == alone.keys()
    assert [name for name in alone if found[name] != alone[name]] == []
    for run in (here / "w").glob("*/checkpoints"):
        assert {verify(each.path) for each in list_checkpoints(run.parent)} == {None}


def test_ten_thousand_broken_checkpoints_are_one_line(tmp_path: Path) -> None:
    for step in range(10_000):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    code, said = finish(start(["train", "--resume", str(tmp_path)]))
    assert code == 2
    assert len(said) < 2500, said[:3000]
    assert "; and 9997 more like these); start the run anew" in said
    assert len([line for line in said.splitlines() if "step-" in line]) == 1
