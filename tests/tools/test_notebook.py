"""tools/toy.ipynb runs from its first cell to its last, and nothing that it starts asks for anything outside this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SMALL = """\
FOLDER = {folder!r}
TRAIN, VALIDATION = 200, 48
STEPS, BATCH, WARMUP = 6, 8, 2
SAMPLING_STEPS, SCORED_PROMPTS = 2, 12
"""
# Python tells its audit hooks of every connection and of every name that is looked up, in all processes that are started.
AUDIT = """\
import os, socket, sys

HERE = {{"localhost", "127.0.0.1", "::1", "0.0.0.0", "", None, socket.gethostname()}}


def hook(event, arguments):
    if event == "socket.getaddrinfo":
        asked = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        asked = arguments[1][0]
    else:
        return
    asked = asked.decode() if isinstance(asked, bytes) else asked
    if asked not in HERE:
        with open({log!r}, "a") as file:
            file.write(f"{{asked}} by {{sys.argv}}\\n")


sys.addaudithook(hook)
"""


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((ROOT / "tools" / "toy.ipynb").read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def test_the_notebook_is_kept_without_what_it_printed() -> None:
    assert len(cells()) > 5
    for cell in cells():
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
    assert [cell["metadata"].get("tags") for cell in cells()].count(["parameters"]) == 1


def test_the_audit_sees_a_connection(tmp_path: Path) -> None:
    log = audited(tmp_path)
    code = "import socket\ntry:\n    socket.create_connection(('host.invalid', 80), timeout=1)\nexcept OSError:\n    pass"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(tmp_path))
    assert "host.invalid by" in log.read_text()


def audited(folder: Path) -> Path:
    """Write the hook where every Python that is started finds it; returns the file that it writes to."""
    (folder / "sitecustomize.py").write_text(AUDIT.format(log=str(folder / "asked.txt")))
    return folder / "asked.txt"


def environment(folder: Path) -> dict[str, str]:
    """No variable keeps a library offline: what is not asked for is not sent."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB_"))}
    path = os.pathsep.join([str(folder), str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.mark.distributed_full
def test_the_notebook_runs_and_nothing_leaves_this_machine(tmp_path: Path) -> None:
    log, folder = audited(tmp_path), tmp_path / "toy"
    sources = [
        SMALL.format(folder=str(folder)) if cell["metadata"].get("tags") else "".join(cell["source"])
        for cell in cells()
    ]
    script = tmp_path / "toy.py"
    script.write_text("\n\n".join(sources))
    done = subprocess.run(
        [sys.executable, script],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for made in ("run/curves.png", "model/model_index.json", "samples/grid.png", "scores/examples.png"):
        assert (folder / made).is_file(), made
    assert not log.exists(), log.read_text()
