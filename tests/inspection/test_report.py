"""The page about runs: what it says of folders whose contents are written by hand."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rmoe_megatron.errors import UserError
from rmoe_megatron.inspection.report import Run, page, summary, write_report
from tests.support.commands import rmoe
from tests.support.runs import make_run


def written(folder: Path, name: str, learning_rate: str, losses: list[float]) -> Path:
    """A run of 40 steps, logged every ten, with a sample grid of each; the last line of its metrics is torn."""
    run = folder / name
    (run / "samples").mkdir(parents=True)
    text = make_run(folder / f"{name}-data").read_text().replace("steps: 20", "steps: 40")
    (run / "config.yaml").write_text(text.replace("1.0e-3", learning_rate))
    records = [
        {
            "step": 10 * number, "loss": loss, "samples": 80 * number, "samples_per_second": 40.0, "data_wait_seconds": 0.05,
            "skipped_steps": 1, "gate_entropy": 0.5, "gate_entropy_1_1": 0.5,
        }
        for number, loss in enumerate(losses, start=1)
    ]  # fmt: skip
    records.insert(2, {"step": 20, "validation_loss": 0.25, "shapes_seen": 0.125})
    records.append({"step": 10 * len(losses), "validation_loss": 0.5, "shapes_seen": 0.75})
    lines = [json.dumps(record) for record in records]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 50, "lo')
    events = [
        {"event": "started", "time": "2026-11-30T08:00:00+00:00", "step": 0, "ranks": 2, "job": "7"},
        {
            "event": "interrupted",
            "time": "2026-11-30T08:30:00+00:00",
            "step": 13,
            "ranks": 2,
            "why": "<SIGUSR1>",
        },
        {"event": "resumed", "time": "2026-11-30T09:00:00+00:00", "step": 13, "ranks": 2},
    ]
    (run / "history.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    for step in (20, 40):
        picture = Image.fromarray(np.full((8, 8, 3), step, dtype=np.uint8))
        picture.save(run / "samples" / f"step-{step:08d}.png")
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        written(tmp_path, "one", "1.0e-3", [0.9, 0.7, 0.6, 0.5]),
        written(tmp_path, "two", "2.0e-3", [0.8, 0.4]),
    ]


def test_the_table_says_what_the_files_say(runs: list[Path]) -> None:
    rows = {name: values for name, *values in summary([Run.read(run) for run in runs])}
    assert rows == {
        "state": ["is trained, or was killed (since 2026-11-30 09:00)"] * 2,
        "step": ["40 of 40", "20 of 40"],
        "samples": ["320", "160"],
        "loss": ["0.5", "0.4"],
        "best validation loss": ["0.25 at step 20"] * 2,
        "samples/s (median)": ["40"] * 2,
        "restarts": ["1"] * 2,
        "skipped steps": ["1"] * 2,
        "newest checkpoint": ["none"] * 2,
    }


def test_waiting_is_a_share_of_a_step(runs: list[Path]) -> None:
    """Eight samples a step at 40 a second take 0.2 s, of which 0.05 were spent waiting."""
    values = Run.read(runs[0]).values("data_wait_share")
    assert [step for step, _ in values] == [10, 20, 30, 40]
    assert [share for _, share in values] == pytest.approx([0.25] * 4)


def test_a_page_of_one_run(runs: list[Path]) -> None:
    text = page([Run.read(runs[0])])
    assert re.findall(r"<td>shapes_seen<td>([^<]*)", text) == ["0.750"]
    assert "<td>optimizer.learning_rate<td>0.001<td>\n" not in text
    assert re.search(r"<td>optimizer\.learning_rate<td>0\.001<td>(?!\w)", text)  # it has no default
    assert "<td>optimizer.ema_decay<td>0.9<td>0.999" in text
    assert "<td>optimizer.beta1" not in text  # as by default
    assert "&lt;SIGUSR1&gt;" in text
    assert [(step, bool(hidden)) for step, hidden in re.findall(r"alt='step (\d+)'( hidden)?", text)] == [
        ("20", True),
        ("40", False),
    ]
    assert not re.search(r"(src|href)=(?!'data:image/png;base64,)", text)


def test_a_page_of_two_says_where_they_differ(runs: list[Path]) -> None:
    text = page([Run.read(run) for run in runs])
    keys = re.findall(r"<tr><td>([a-z_]+\.?[a-z_.]*)<td>", text[text.index("where the runs differ") :])
    assert set(keys) == {"run_dir", "data.train", "data.validation", "optimizer.learning_rate"}
    assert "<td>optimizer.learning_rate<td>0.001<td>0.002" in text


def test_the_command(runs: list[Path], tmp_path: Path) -> None:
    code, errors = rmoe("report", str(runs[0]))
    assert code == 0, errors
    assert (runs[0] / "report.html").read_text() == page([Run.read(runs[0])])
    code, errors = rmoe("report", *map(str, runs), "--out", str(tmp_path / "pages" / "both.html"))
    assert code == 0, errors
    assert (tmp_path / "pages" / "both.html").is_file()
    with pytest.raises(UserError, match="There is no run at"):
        write_report([tmp_path], tmp_path / "page.html")
    shutil.rmtree(runs[1] / "samples")
    (runs[1] / "metrics.jsonl").unlink()
    (runs[1] / "history.jsonl").unlink()
    assert "nothing is known of its start" in page([Run.read(runs[1])])  # just begun


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium: apt-get install chromium")
def test_the_slider_moves_in_a_browser(runs: list[Path], tmp_path: Path) -> None:
    text = page([Run.read(runs[0])])
    moved = "<script>const s = document.querySelector('input'); s.value = 0; s.dispatchEvent(new Event('input'));</script></html>"
    for name, content, step in (("as it is", text, 40), ("moved", text.replace("</html>", moved), 20)):
        path = tmp_path / "page.html"
        path.write_text(content)
        command = [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path}/browser",
            "--dump-dom",
            f"file://{path}",
        ]
        found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        assert f"<output>step {step}</output>" in found, name
        shown = [
            int(each) for each, hidden in re.findall(r'alt="step (\d+)"( hidden="")?', found) if not hidden
        ]
        assert shown == [step], name
