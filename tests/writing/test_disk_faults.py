"""Every command that writes, on a disk that answers with an error in the middle of it.

Each call that writes, makes, renames, removes or puts something on the disk fails in its turn. The command ends with one sentence, or
warns and goes on where it can do without; nothing that is not whole has a final name; and the command, given again, does its work.
"""

import errno
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from rmoe_megatron.checkpoint.folders import list_checkpoints, verify
from tests.support.disk_faults import Fault, FaultyDisk, Outcome, compiler
from tests.support.writing_commands import COMMANDS, leftovers, prepare, result

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C compiler: apt-get install gcc")

ERRORS = [
    errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ESTALE, errno.EACCES, errno.ENAMETOOLONG,
]  # fmt: skip
# Calls of each command that fail in the suite, at equal distances; with distributed_full all of them do.
CALLS_OF_SUITE = 3
DEAR = {
    "train",
    "train --resume",
    "eval geneval",
    "diagnose precision",
}  # which take seconds each time: with distributed_full only


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyDisk]:
    disk = FaultyDisk(tmp_path_factory.mktemp("disk"))
    yield disk
    disk.close()


def check_sentence(outcome: Outcome, here: Path, where: str) -> None:
    """One sentence that names a place of this disk, and nothing of Python's."""
    assert "Traceback" not in outcome.said, where
    lines = [line for line in outcome.said.splitlines() if line.startswith("error: ")]
    assert len(lines) == (outcome.code != 0), where
    if lines:
        assert outcome.code == 2, where
        assert re.search(rf"({re.escape(str(here))}/)?\bw(/|\b)", lines[0]), where
        assert lines[0].endswith("."), where


def check_whole(folder: Path, clean: dict[str, object], where: str) -> None:
    """What has a final name is as it was without faults; checkpoints verify."""
    for run in folder.glob("*/checkpoints"):
        for checkpoint in list_checkpoints(run.parent):
            assert verify(checkpoint.path) is None, where
    for name, content in result(folder).items():
        if name in clean and not re.search(r"metrics|run_state|config\.yaml|checkpoints", name):
            assert content == clean[name], (where, name)


def again(disk: FaultyDisk, here: Path, arguments: list[str]) -> Outcome:
    """Give the same command, for a run that has come to a checkpoint as it is told to."""
    outcome = disk.run(arguments, here, here / "w")
    if "continue it with `rmoe train --resume" in outcome.said:
        outcome = disk.run(["train", "--resume", "w/run"], here, here / "w")
    return outcome


def telling(calls: list[tuple[str, str]]) -> list[int]:
    """The numbers of calls, from 1; of a row of like ones, as the writes to one file are, the first and the last."""
    return [
        number
        for number, call in enumerate(calls, start=1)
        if number in (1, len(calls)) or call != calls[number - 2] or call != calls[number]
    ]


def faults(calls: list[tuple[str, str]], is_whole: bool) -> list[Fault]:
    """Which call fails how: each once, with the errors in turn; and from every third on for good, with the errors in another turn."""
    numbers = telling(calls)
    if not is_whole:
        last = CALLS_OF_SUITE - 1
        numbers = sorted({numbers[(len(numbers) - 1) * k // last] for k in range(CALLS_OF_SUITE)})
    once = [Fault(number, ERRORS[number % len(ERRORS)]) for number in numbers]
    for_good = [Fault(number, ERRORS[(number // 2 + 3) % len(ERRORS)], lasts=True) for number in numbers]
    return once + for_good[::3] if is_whole else once + for_good[1:2]


@pytest.mark.parametrize(
    ("command", "is_whole"),
    [
        *((command, False) for command in COMMANDS if command not in DEAR),
        *(pytest.param(command, True, marks=pytest.mark.distributed_full) for command in COMMANDS),
    ],
)
def test_a_command_meets_a_disk_that_fails(
    command: str, is_whole: bool, disk: FaultyDisk, here: Path
) -> None:
    arguments = prepare(here, command)
    first = disk.run(arguments, here, here / "w")
    assert first.code == 0, first.said
    assert not leftovers(here / "w")
    clean = result(here / "w")
    problems = []
    for fault in faults(first.calls, is_whole):
        try:
            check_fault(command, fault, clean, disk, here)
        except AssertionError as problem:
            problems.append(str(problem).partition("\nassert")[0])
    assert not problems, f"{len(problems)} of the faults:\n" + "\n".join(problems)


def check_fault(command: str, fault: Fault, clean: dict[str, object], disk: FaultyDisk, here: Path) -> None:
    arguments = prepare(here, command)
    outcome = disk.run(arguments, here, here / "w", fault)
    call = " ".join(outcome.calls[fault.nth - 1]) if len(outcome.calls) >= fault.nth else "not reached"
    where = (
        f"{command}, call {fault.nth} ({call}) {errno.errorcode[fault.error]}{' for good' if fault.lasts else ''}: "
        f"exit code {outcome.code}, {outcome.said}"
    )
    check_sentence(outcome, here, where)
    check_whole(here / "w", clean, where)
    is_removal = call.startswith(("unlink", "rmdir"))
    removes = not fault.lasts or fault.error in (errno.ENOSPC, errno.EDQUOT)
    if removes and not is_removal:
        assert not leftovers(here / "w"), (where, leftovers(here / "w"))
    goes_on = "The run goes on" in outcome.said
    left = leftovers(here / "w")
    found = {name: content for name, content in result(here / "w").items() if name not in left}
    is_said = not left or "WARNING" in outcome.said
    # A disk that takes nothing any more may have taken it all before: what is there is whole, and its name may not outlive a crash.
    if (outcome.code == 0 or fault.lasts) and is_said and not differences(clean, found, goes_on):
        return
    second = again(disk, here, arguments)
    assert second.code == 0, f"{where} Then: {second.said}"
    different = differences(clean, result(here / "w"), goes_on)
    if (
        "Old checkpoints stay for now" in outcome.said
    ):  # a finished run has no next save, which would remove the rest
        different = [name for name in different if "step-00000001" not in name]
    assert not different, f"{where} Then: {different} differ"


def differences(clean: dict[str, object], found: dict[str, object], goes_on: bool) -> list[str]:
    """The names of what differs; of a run that went on without something, only what it had to make."""
    names = sorted(clean.keys() | found.keys())
    if goes_on:
        names = [name for name in names if not re.search(r"step-0000000[12]|samples", name)]
    return [name for name in names if clean.get(name, "") != found.get(name, "")]


def number_of(calls: list[tuple[str, str]], kind: str, name: str) -> int:
    """The number, from 1, of the last call of a kind on a path in which ``name`` occurs."""
    return max(n for n, (called, path) in enumerate(calls, start=1) if called == kind and name in path)


def test_a_training_goes_on_without_what_can_be_made_up_for(disk: FaultyDisk, here: Path) -> None:
    """Each of these fails once: the run says so, and what it can do without ends no run."""
    arguments = prepare(here, "train")
    calls = disk.run(arguments, here, here / "w").calls
    clean = result(here / "w")
    records = (here / "w" / "run" / "metrics.jsonl").read_text().count("\n")
    for kind, name, words in (
        ("open", "checkpoints/.step-00000001", "is not saved (rank 0): w/run/checkpoints/step-00000001 cannot be written"),
        ("rename", "samples/step-00000002.png", "The samples of step 2: w/run/samples/step-00000002.png cannot be written"),
        ("write", "metrics.jsonl", "Records wait in memory: w/run/metrics.jsonl cannot be written"),
        ("fsync", "curves.png", "curves.png stays as it is"),
        ("write", "history.jsonl", "The history of w/run lacks that it finished at step 3"),
        ("unlink", "checkpoints/step-00000001", "Old checkpoints stay for now"),
    ):  # fmt: skip
        prepare(here, "train")
        fault = Fault(number_of(calls, kind, name), errno.ENOSPC)
        outcome = disk.run(arguments, here, here / "w", fault)
        assert outcome.code == 0, outcome.said
        assert (
            len([line for line in outcome.said.splitlines() if words in line and "WARNING" in line]) == 1
        ), outcome.said
        assert result(here / "w")["step-00000003 holds"] == clean["step-00000003 holds"]
        assert (here / "w" / "run" / "metrics.jsonl").read_text().count("\n") == records, outcome.said
        # What is removed in part has no final name, and goes with the next save.
        assert not leftovers(here / "w")
        removed = (here / "w" / "run" / "checkpoints").glob("step-00000001.removed.partial")
        assert len(list(removed)) == (kind == "unlink")


def test_the_disk_of_one_rank_of_two_is_full(disk: FaultyDisk, here: Path) -> None:
    arguments = prepare(here, "train")
    clean = disk.run(arguments, here, here / "w", Fault(rank=1), ranks=2)
    assert clean.code == 0, clean.said
    prepare(here, "train")
    first = next(n for n, (_, path) in enumerate(clean.calls, start=1) if path.endswith(".distcp"))
    fault = Fault(first, errno.ENOSPC, lasts=True, rank=1)
    outcome = disk.run(arguments, here, here / "w", fault, ranks=2)
    assert outcome.code == 2, outcome.said
    assert "Traceback" not in outcome.said
    for step in (1, 2):  # which are tried again
        assert f"w/run/checkpoints/step-0000000{step} is not saved (rank 1): " in outcome.said, outcome.said
    (error,) = [line for line in outcome.said.splitlines() if line.startswith("error: w")]
    here_it_is = "error: w/run/checkpoints/step-00000003 is not saved (rank 1): w/run/checkpoints/step-00000003 cannot be"
    assert error.startswith(here_it_is)
    assert "No space left on device" in error
    assert "make room there" in error
    assert list_checkpoints(here / "w" / "run") == []
    assert not leftovers(here / "w")
    second = disk.run(arguments, here, here / "w", ranks=2)
    assert second.code == 0, second.said
    assert list_checkpoints(here / "w" / "run")[0].step == 3
