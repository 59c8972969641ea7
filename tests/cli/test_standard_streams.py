"""What is printed may get lost; who prints it goes on, and ends with its own exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """\
import contextlib, logging, os, sys
from rmoe_megatron.cli import standard_streams
standard_streams.open_closed()
standard_streams.outlive_reader("stdout", "stderr")
logging.basicConfig()
for number in range(3000):
    print("line", number)
    print("line", number, "of é", file=sys.stderr, flush=True)
logging.warning("warned")
file = open(sys.argv[1], "w")
assert file.fileno() > 2, file.fileno()
with contextlib.suppress(OSError):
    os.write(2, b"a library's message")
file.write("whole")
sys.exit(75)
"""


def run(tmp_path: Path, **streams: object) -> int:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "file")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, **streams)  # type: ignore[call-overload]
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.readline()
            stream.close()  # the reader ends first
    return process.wait(timeout=60)


@pytest.mark.parametrize("kind", ["closed by the reader", "closed from the start", "a full disk", "in order"])
def test_what_is_printed_ends_no_process(tmp_path: Path, kind: str) -> None:
    if kind == "closed by the reader":
        code = run(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    elif kind == "closed from the start":
        code = run(tmp_path, preexec_fn=lambda: [os.close(number) for number in (0, 1, 2)])
    else:
        path = tmp_path / "log" if kind == "in order" else Path("/dev/full")
        with path.open("w") as file:
            code = run(tmp_path, stdout=file, stderr=file)
        if kind == "in order":
            lines = path.read_text().splitlines()
            assert lines[:2] == ["line 0", "line 0 of é"]
            assert lines[-2:] == ["WARNING:root:warned", "a library's message"]
    assert code == 75
    assert (tmp_path / "file").read_text() == "whole"
