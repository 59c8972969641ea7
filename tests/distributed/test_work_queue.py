"""Units are done once by many processes, and again only if who had them died."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rmoe_megatron.distributed import work_queue
from rmoe_megatron.distributed.work_queue import WorkQueue
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import claims
from tests.support.commands import kill

PROGRAM = """\
import sys, time
from pathlib import Path
from rmoe_megatron.distributed.work_queue import WorkQueue
folder, name, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
queue = WorkQueue(folder / "claims", 12, lambda unit: (folder / f"{unit}.done").exists(), first=int(name) * 5)
for unit in queue.take():
    with (folder / "log").open("a") as log:
        log.write(f"{name} {unit}\\n")
    time.sleep(seconds)
    (folder / f"{unit}.done").touch()
"""


def start(folder: Path, name: int, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), str(name), str(seconds)],
        text=True,
        start_new_session=True,
    )


def log(folder: Path) -> list[tuple[str, int]]:
    lines = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
    return [(line.split()[0], int(line.split()[1])) for line in lines]


def test_a_slow_process_holds_up_nobody_and_nothing_is_done_twice(tmp_path: Path) -> None:
    processes = [start(tmp_path, 0, 0.6), start(tmp_path, 1, 0.05)]
    for process in processes:
        assert process.wait(timeout=60) == 0
    assert sorted(unit for _, unit in log(tmp_path)) == list(range(12))
    by_process = [sum(name == str(number) for name, _ in log(tmp_path)) for number in (0, 1)]
    assert by_process[0] >= 1
    assert by_process[1] > by_process[0]
    assert not (tmp_path / "claims").exists()


def test_what_a_killed_process_had_in_flight_is_done_again_and_no_more(tmp_path: Path) -> None:
    process = start(tmp_path, 0, 0.2)
    deadline = time.monotonic() + 60
    while len(log(tmp_path)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kill(process)
    before = len(log(tmp_path))
    assert start(tmp_path, 1, 0.0).wait(timeout=60) == 0
    assert len(log(tmp_path)) == 12 + 1
    in_flight = log(tmp_path)[before - 1][1]
    assert [unit for _, unit in log(tmp_path)].count(in_flight) == 2


@pytest.mark.parametrize("ahead", [-3600.0, 0.0, 3600.0])
def test_the_clock_of_this_host_may_be_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    young, old = tmp_path / "young", tmp_path / "old"
    for path in (young, old):
        path.write_text("elsewhere 12")
    touched = young.stat().st_mtime - 2 * claims.LEASE
    os.utime(old, (touched, touched))
    real = time.time
    monkeypatch.setattr(claims.time, "time", lambda: real() + ahead)
    assert claims.is_void(old)
    assert not claims.is_void(young)


def test_a_claim_of_another_host_is_void_when_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, done = tmp_path / "claims", set[int]()
    folder.mkdir()
    young, old, alive = (folder / f"{unit:08d}.claim" for unit in range(3))
    for path in (young, old):
        path.write_text("elsewhere 12")
    alive.write_text(f"{socket.gethostname()} {os.getppid()}")  # of this very host, and it lives
    os.utime(old, (0, 0))
    monkeypatch.setattr(work_queue, "POLL", 0.01)
    queue, taken = WorkQueue(folder, 3, done.__contains__), []
    for unit in queue.take():
        taken.append(unit)
        done.add(unit)
        if unit == 1:
            assert young.exists()
            os.utime(young, (0, 0))
        else:
            done.add(2)  # which the other process has done
    assert taken == [1, 0]


def test_who_comes_when_the_folder_has_another_name_makes_no_other(tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    queue = WorkQueue(unfinished / "claims", 1, lambda unit: not unfinished.exists())
    assert list(queue.take()) == []
    assert not unfinished.exists()


def test_a_process_of_another_host_may_be_gone_with_it(tmp_path: Path) -> None:
    (tmp_path / "claim").write_text("lost 12")
    said = (
        "It is claimed by process 12 on lost; wait for its end (if lost is gone, ten minutes after that), or"
    )
    with (
        pytest.raises(UserError, match=re.escape(said)),
        claims.only_process(tmp_path / "claim", "It is claimed"),
    ):
        pass


def test_a_claim_that_does_not_say_whose_it_is_is_soon_void(tmp_path: Path) -> None:
    """A full disk let its process make it, but neither write nor remove it."""
    path = tmp_path / "claim"
    path.touch()
    assert not claims.is_void(path, claims.LONG_LEASE)  # it may be about to be written
    touched = path.stat().st_mtime - claims.TAKEOVER + 1
    os.utime(path, (touched, touched))
    with claims.only_process(path, "It is claimed"):
        assert claims.holder(path) == claims.this_process()


def test_a_claim_is_kept_young_while_a_unit_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT", 0.05)
    done = set[int]()
    for unit in WorkQueue(tmp_path / "claims", 1, done.__contains__).take():
        claim = tmp_path / "claims" / "00000000.claim"
        os.utime(claim, (0, 0))
        deadline = time.monotonic() + 10
        while claim.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        done.add(unit)


def test_many_that_find_a_void_claim_make_one_claim_of_it(tmp_path: Path) -> None:
    """Each removes the claim of a dead process, which must never be the new claim of another one."""
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom rmoe_megatron.files import claims\n"
        "folder = Path(sys.argv[1]); (folder / f'ready.{sys.argv[2]}').touch()\n"
        "while not (folder / 'go').exists(): pass\n"
        "for number in range(40):\n"
        "    if claims.take(folder / f'{number}.claim'): print(number, flush=True)\n"
        "time.sleep(30)"  # who holds a claim lives
    )
    for number in range(40):
        (tmp_path / f"{number}.claim").write_text(f"{socket.gethostname()} 999999999")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path), str(number)], stdout=subprocess.PIPE, text=True
        )
        for number in range(3)
    ]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready.*"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (tmp_path / "go").touch()
    time.sleep(3)
    taken = list[int]()
    for process in processes:
        process.kill()
        assert process.stdout is not None
        taken += [int(line) for line in process.stdout.read().split()]
        process.wait()
    assert len(taken) == len(set(taken))
    assert len(taken) >= 30  # where two were about to remove it, one more look is needed
