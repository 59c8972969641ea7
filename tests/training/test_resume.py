"""A killed run goes on as if nothing had happened, and damaged checkpoints are passed over."""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rmoe_megatron.checkpoint.folders import find_checkpoint, list_checkpoints
from rmoe_megatron.errors import UserError
from tests.support.commands import finish, kill, rmoe, session_processes, start
from tests.support.runs import losses, make_run


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    code, errors = rmoe("train", str(make_run(folder)), f"run_dir={folder}/whole", "checkpoint.keep_last=4")
    assert code == 0, errors
    return folder


def has_logged(step: int) -> Callable[[Path], bool]:
    return lambda run_dir: (run_dir / "metrics.jsonl").is_file() and max(losses(run_dir), default=0) >= step


def saves(step: int) -> Callable[[Path], bool]:
    return lambda run_dir: any(run_dir.glob(f"checkpoints/step-{step:08d}*"))


def test_the_loss_at_fixed_timesteps_is_the_mean_over_them(finished_run: Path) -> None:
    found = losses(finished_run / "whole", "fixed_timestep_loss")
    assert list(found) == [10, 20]
    at_times = [
        losses(finished_run / "whole", f"fixed_timestep_loss_{number / 8:.3f}") for number in range(8)
    ]
    for step, loss in found.items():
        assert loss == pytest.approx(sum(each[step] for each in at_times) / 8)
    assert len({each[20] for each in at_times}) == 8


def test_killed_run_resumes_bitwise_and_leaves_no_process(finished_run: Path) -> None:
    run_dir = finished_run / "killed"
    command = ["train", str(finished_run / "config.yaml"), f"run_dir={run_dir}", "data.num_workers=1"]
    for has_come in (saves(10), has_logged(13), saves(15)):
        process = start(command)
        deadline = time.monotonic() + 120
        while not has_come(run_dir):
            assert process.poll() is None, finish(process)
            assert time.monotonic() < deadline, finish(process)
            time.sleep(0.002)
        process.kill()  # the process alone, as the kernel does when memory runs out; not its group
        process.wait()
        deadline = time.monotonic() + 15
        while left := session_processes(process.pid):
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
        assert max(losses(run_dir)) < 20
        command = ["train", "--resume", str(run_dir)]
    code, errors = rmoe(*command)
    assert code == 0, errors
    assert losses(run_dir) == losses(finished_run / "whole")
    for key in ("validation_loss", "fixed_timestep_loss", "fixed_timestep_loss_0.875"):
        assert losses(run_dir, key) == losses(finished_run / "whole", key)


def test_delayed_scales_are_resumed(tmp_path: Path) -> None:
    """Histories of scales are saved with a run in emulated FP8; its weights are not asked for them elsewhere."""
    config = str(make_run(tmp_path))
    fp8 = ["precision=fp8_emulated", "fp8.recipe=delayed", "training.sample_prompts=[]", "training.steps=10"]
    code, errors = rmoe("train", config, *fp8, "optimizer.learning_rate=0.01")
    assert code == 0, errors
    whole, run_dir = losses(tmp_path / "run"), tmp_path / "run"
    shutil.rmtree(list_checkpoints(run_dir)[0].path)
    code, errors = rmoe("train", "--resume", str(run_dir))
    assert code == 0, errors
    assert losses(run_dir) == whole
    # Without a history of theirs, scales start one.
    other = ["fp8.recipe=tensorwise", f"run_dir={tmp_path / 'other'}", "training.steps=5"]
    code, errors = rmoe("train", config, *fp8, *other)
    assert code == 0, errors
    code, errors = rmoe(
        "train", "--resume", str(tmp_path / "other"), "training.steps=7", "fp8.recipe=delayed"
    )
    assert code == 0, errors
    code, errors = rmoe("convert", "to-hf", str(run_dir), str(tmp_path / "model"))
    assert code == 0, errors


def test_precision_is_decided_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor whose instructions for bf16 are left unused, as on one without any, ``auto`` is fp32, and stays it."""
    config, run_dir = str(make_run(tmp_path)), tmp_path / "run"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    code, errors = rmoe("train", config, "precision=auto", "training.steps=5", "training.sample_prompts=[]")
    assert code == 0, errors
    assert "The run computes in fp32 on the CPU" in errors
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    code, errors = rmoe("train", "--resume", str(run_dir), "precision=auto", "training.steps=7")
    assert code == 0, errors
    assert "precision: fp32\n" in (run_dir / "config.yaml").read_text()
    assert len(losses(run_dir)) == 7


def test_bf16_on_a_processor_without_it_says_what_it_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(make_run(tmp_path))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    code, errors = rmoe("train", config, "precision=bf16", "training.steps=3", "training.sample_prompts=[]")
    assert code == 0, errors
    assert "times as long as in fp32; precision=auto would take fp32." in errors
    assert "precision: bf16\n" in (tmp_path / "run" / "config.yaml").read_text()


def test_half_written_checkpoint_is_passed_over(finished_run: Path) -> None:
    run_dir = finished_run / "damaged"
    shutil.copytree(finished_run / "whole", run_dir)
    newest, previous = list_checkpoints(run_dir)[:2]
    shard = next(newest.path.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-10])
    code, errors = rmoe("train", "--resume", str(run_dir))
    assert code == 0, errors
    assert "half-written" in errors
    assert previous.path.name in errors
    assert losses(run_dir) == losses(finished_run / "whole")


def test_flipped_bits_fail_the_checksum(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run / "whole", tmp_path / "run")
    newest, previous = list_checkpoints(tmp_path / "run")[:2]
    shard = next(newest.path.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert find_checkpoint(tmp_path / "run") == previous
    with pytest.raises(UserError, match="checksum"):
        find_checkpoint(tmp_path / "run", newest.step)


def test_resume_refuses_another_architecture(finished_run: Path) -> None:
    code, errors = rmoe("train", "--resume", str(finished_run / "whole"), "model.hidden_size=64")
    assert code == 2
    assert "another architecture" in errors
    assert "Traceback" not in errors


def test_old_checkpoints_are_removed(finished_run: Path) -> None:
    assert [checkpoint.step for checkpoint in list_checkpoints(finished_run / "whole")] == [20, 15, 10, 5]
    assert [checkpoint.step for checkpoint in list_checkpoints(finished_run / "killed")] == [20, 15]


def test_resume_on_two_ranks_keeps_the_losses(finished_run: Path) -> None:
    run_dir = finished_run / "resharded"
    shutil.copytree(finished_run / "whole", run_dir)
    shutil.rmtree(list_checkpoints(run_dir)[0].path)
    overrides = ["parallel.expert_model_parallel_size=2"]
    code, errors = rmoe("train", "--resume", str(run_dir), *overrides, ranks=2)
    assert code == 0, errors
    assert losses(run_dir) == pytest.approx(losses(finished_run / "whole"), abs=1e-4)


def test_overrides_of_the_schedule_are_followed(finished_run: Path) -> None:
    run_dir = finished_run / "longer"
    shutil.copytree(finished_run / "whole", run_dir)
    for checkpoint in list_checkpoints(run_dir):
        if checkpoint.step > 10:
            shutil.rmtree(checkpoint.path)
    overrides = ["optimizer.learning_rate=4e-4", "optimizer.min_learning_rate=1e-4", "training.steps=24"]
    code, errors = rmoe("train", "--resume", str(run_dir), *overrides, "optimizer.weight_decay=0.5")
    assert code == 0, errors
    rates = losses(run_dir, "learning_rate")
    for step in range(11, 25):
        done, warmup = step - 1, 2
        cosine = 0.5 * (1 + math.cos(math.pi * (done - warmup) / (24 - warmup)))
        assert rates[step] == pytest.approx(1e-4 + 3e-4 * cosine, rel=1e-6)
    assert "learning_rate: 0.0004" in (run_dir / "config.yaml").read_text()
    assert losses(run_dir)[10] == losses(finished_run / "whole")[10]
    assert losses(run_dir)[20] != losses(finished_run / "whole")[20]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("diffusion.prediction=sample", "diffusion.prediction=velocity"),
        ("precision=bf16", "precision=fp32"),
        ("optimizer.distributed_optimizer=false", "distributed_optimizer=true"),
    ],
)
def test_what_the_weights_depend_on_cannot_be_overridden(
    finished_run: Path, override: str, words: str
) -> None:
    code, errors = rmoe("train", "--resume", str(finished_run / "whole"), override, "training.steps=30")
    assert code == 2
    assert words in errors
    assert "Traceback" not in errors


def test_a_folder_in_use_is_refused_until_its_process_is_gone(finished_run: Path) -> None:
    run_dir = finished_run / "held"
    config = str(finished_run / "config.yaml")
    process = start(["train", config, f"run_dir={run_dir}", "training.steps=100000"])
    deadline = time.monotonic() + 120
    while not list_checkpoints(run_dir):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < deadline, finish(process)
        time.sleep(0.05)
    code, errors = rmoe("train", "--resume", str(run_dir))
    assert code == 2
    assert f"{run_dir} is in use by process {process.pid} on " in errors
    assert "Traceback" not in errors
    kill(process)
    code, errors = rmoe("train", "--resume", str(run_dir), f"training.steps={max(losses(run_dir)) + 6}")
    assert code == 0, errors
