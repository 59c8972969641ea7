"""The records of a run: complete, readable by others, and continued without repetition."""

import io
import json
import logging
import resource
import sys
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rmoe_megatron.config.run import LoggingConfig
from rmoe_megatron.training.logging import CURVES, METRICS, WANDB_ID, RunLogger, describe_run
from tests.support.configurations import tiny_config


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def log_steps(folder: Path, config: LoggingConfig, first: int, last: int, offset: float = 0.0) -> None:
    log = RunLogger(folder, config, total_steps=10, start_step=first, is_rank0=True)
    for step in range(first + 1, last + 1):
        log.log_metrics(step, {"loss": step + offset}, remaining=60.0 * (10 - step))
    log.close()


def test_a_record_is_on_the_disk_when_it_is_logged(tmp_path: Path) -> None:
    log = RunLogger(tmp_path, LoggingConfig(tensorboard=False), 10, 0, is_rank0=True)
    log.log_metrics(1, {"loss": 0.5, "samples": 8})
    assert records(tmp_path) == [{"step": 1, "loss": 0.5, "samples": 8}]
    log.close()


def test_a_resumed_run_replaces_the_records_it_repeats(tmp_path: Path) -> None:
    config = LoggingConfig(tensorboard=True)
    log_steps(tmp_path, config, 0, 6)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 7, "lo')  # killed while writing
    log_steps(tmp_path, config, 4, 8, offset=0.5)
    expected = [1.0, 2.0, 3.0, 4.0, 5.5, 6.5, 7.5, 8.5]
    assert [record["loss"] for record in records(tmp_path)] == expected
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == list(enumerate(expected, 1))


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    log = RunLogger(tmp_path, LoggingConfig(tensorboard=False), 10, 0, is_rank0=True)
    log.log_metrics(1, {"loss": float("nan"), "grad_norm": float("inf")})
    log.log_metrics(2, {"loss": 1.0, "grad_norm": 2.0})
    log.draw_curves()
    log.close()
    assert (tmp_path / METRICS).read_text().splitlines()[0] == '{"step": 1, "loss": null, "grad_norm": null}'


def test_curves_are_drawn_in_every_panel(tmp_path: Path) -> None:
    log = RunLogger(tmp_path, LoggingConfig(tensorboard=False), 10, 0, is_rank0=True)
    log.log_metrics(1, {"loss": 0.5, "grad_norm": 1.0})
    with warnings.catch_warnings(action="error"):  # some panels have no curve yet
        log.draw_curves()
    few = np.asarray(Image.open(tmp_path / CURVES).convert("RGB")).astype(int)
    log.log_metrics(2, {"loss": 0.25, "grad_norm": 3.0})
    log.log_metrics(3, {"loss": 0.125, "grad_norm": 2.0, "samples_per_second": 7.0})
    log.draw_curves()
    log.close()
    more = np.asarray(Image.open(tmp_path / CURVES).convert("RGB")).astype(int)
    assert few.shape == more.shape
    for panel in np.array_split(np.abs(more - few).sum(axis=-1), 3, axis=1):
        assert (panel > 0).any()


def test_gates_have_a_panel_of_their_own(tmp_path: Path) -> None:
    log = RunLogger(tmp_path, LoggingConfig(tensorboard=False), 10, 0, is_rank0=True)
    for metrics, panels in (
        ({"loss": 0.5}, 3),
        ({"loss": 0.4, "gate_entropy": 0.9, "gate_entropy_0_1": 0.9}, 4),
    ):
        log.log_metrics(panels - 2, metrics)
        log.draw_curves()
        with Image.open(tmp_path / CURVES) as picture:
            assert picture.size == (500 * panels, 400)
    log.close()


def test_images_reach_tensorboard(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 6, 3), 200, dtype=np.uint8)).save(tmp_path / "grid.png")
    log = RunLogger(tmp_path, LoggingConfig(tensorboard=True), 10, 0, is_rank0=True)
    log.log_image("samples", tmp_path / "grid.png", 3)
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    image = events.Images("samples")[0]
    assert (image.step, image.width, image.height) == (3, 6, 4)


def test_without_a_terminal_every_record_is_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_steps(tmp_path, LoggingConfig(tensorboard=False), 0, 2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines == ["step 1/10  loss 1  ETA 09:00", "step 2/10  loss 2  ETA 08:00"]


def test_the_bar_moves_at_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    log = RunLogger(tmp_path, LoggingConfig(tensorboard=False), 10, 4, is_rank0=True)
    log.show_step(5, 0.5)
    assert log.bar.n == 5
    log.log_metrics(6, {"loss": 0.25, "tokens_per_second": 7.0}, remaining=90.0)
    assert log.bar.n == 6
    log.show_step(7, 0.125, remaining=80.0)
    assert log.bar.n == 7
    assert log.bar.postfix == "loss=0.125, tokens_per_second=7, ETA=01:20"
    log.close()
    assert [record["step"] for record in records(tmp_path)] == [6]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_tensorboard_and_wandb_know_the_whole_configuration_and_the_versions(tmp_path: Path) -> None:
    config = tiny_config(seed=7)
    logging_config = LoggingConfig(wandb={"project": "rmoe", "mode": "offline"})
    log = RunLogger(tmp_path, logging_config, 10, 0, is_rank0=True, description=describe_run(config))
    known = dict(log.wandb.config)
    log.close()
    assert (known["configuration"]["seed"], known["configuration"]["precision"]) == (7, "fp32")
    assert known["configuration"]["recurrence"]["num_modules"] == 4
    assert known["versions"]["torch"] == torch.__version__.partition("+")[0]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("configuration", "versions"):
        (text,) = events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val
        assert json.loads(text.decode().strip("`\n")) == known[name]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLogger(tmp_path, LoggingConfig(tensorboard=True), 10, 0, is_rank0=False)
    log.log_metrics(1, {"loss": 1.0})
    log.log_image("samples", tmp_path / "grid.png", 1)
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_offline_wandb_keeps_its_id_over_a_resume(tmp_path: Path) -> None:
    config = LoggingConfig(tensorboard=False, wandb={"project": "rmoe", "mode": "offline"})
    log_steps(tmp_path, config, 0, 2)
    first = (tmp_path / WANDB_ID).read_text()
    log_steps(tmp_path, config, 2, 4)
    assert (tmp_path / WANDB_ID).read_text() == first
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert runs
    # What else stands in the name is wandb's affair.
    assert all(first in run.name for run in runs)


def test_the_end_of_wandbs_process_is_not_the_end_of_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = LoggingConfig(tensorboard=False, wandb={"project": "rmoe", "mode": "offline"})
    log = RunLogger(tmp_path, config, 10, 0, is_rank0=True)
    log.log_metrics(1, {"loss": 1.0})
    service = [each for each in psutil.Process().children(recursive=True) if each.name() == "wandb-core"]
    assert service
    for process in service:
        process.terminate()  # as SLURM does to every process of a job
    psutil.wait_procs(service, timeout=10)
    with caplog.at_level(logging.WARNING):
        log.log_metrics(2, {"loss": 0.5})
        log.log_metrics(3, {"loss": 0.25})
        log.close()
    assert caplog.text.count("wandb takes no more of this run") == 1
    assert [record["loss"] for record in records(tmp_path)] == [1.0, 0.5, 0.25]
    assert (tmp_path / "status").read_text() == "step 3/10  loss 0.25\n"


def test_records_that_python_wrote_with_nan_are_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text(
        '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": Infinity}\n'
    )
    log = RunLogger(tmp_path, LoggingConfig(tensorboard=False), 10, 1, is_rank0=True)
    log.draw_curves()
    log.close()
    assert records(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_a_record_that_the_disk_did_not_take_is_written_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """``capsys`` keeps the output in memory, where the limit of files does not reach it."""
    log = RunLogger(tmp_path, LoggingConfig(tensorboard=False), 2, 0, is_rank0=True)
    log.log_metrics(1, {"loss": 0.5})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / METRICS).stat().st_size, limits[1]))
    try:
        log.log_metrics(2, {"loss": 0.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.close()
    assert (tmp_path / METRICS).read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n'
    assert "Records wait in memory" in caplog.text
    assert "are lost" not in caplog.text
