"""What is checked where a job is submitted: no GPU, no Megatron-Core, nothing downloaded."""

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from rmoe_megatron.checkpoint.folders import list_checkpoints
from rmoe_megatron.config.loading import load_config
from rmoe_megatron.errors import UserError
from rmoe_megatron.training import preflight
from tests.data.test_shards import png
from tests.support.commands import rmoe
from tests.support.runs import make_run, write_shard

Usage = namedtuple("Usage", ["total", "used", "free"])
# As the command line does it, on a machine that has no Megatron-Core.
CHECK = """\
import sys
sys.modules["megatron"] = sys.modules["megatron.core"] = None
sys.argv = ["rmoe", "train", *sys.argv[1:]]
from rmoe_megatron.cli import main
main()
"""


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHECK, *arguments, "--check"], capture_output=True, text=True, timeout=120
    )


def test_the_check_needs_no_gpu_and_no_megatron_core(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    done = check(str(config), "device=cuda", "--ranks", "2", "parallel.expert_model_parallel_size=2")
    assert done.returncode == 0, done.stderr
    assert "# 2 ranks = data 2 x tensor 1 x context 1 x pipeline 1;" in done.stdout
    assert done.stdout.endswith(f"# run folder: {tmp_path}/run\n")
    assert not (tmp_path / "run").exists()
    assert load_config(config, []).seed == 0
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(done.stdout)
    assert load_config(resolved, []).parallel.expert_model_parallel_size == 2
    done = check(str(config), "--ranks", "3")
    assert done.returncode == 2
    assert done.stderr.startswith("error: training.global_batch_size (8) is not divisible by")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["model.text_length=7"], "text_hidden_states from"),
        (["data.train={folder}/images"], "4 x 4 pixels, smaller than the model's 8 x 8"),
        (["encoders.autoencoder=nobody/nothing"], "run `hf download nobody/nothing`"),
        (["encoders.text_encoder={folder}/nothing"], "There is no folder"),
        (["encoders.text_encoder={folder}/data"], "There is no model.safetensors (or its index) in"),
        (["training.steps=1000000000", "checkpoint.keep_last=1000000", "checkpoint.every=1"], "of free disk"),
    ],
)
def test_what_a_job_would_find_out_too_late(tmp_path: Path, settings: list[str], words: str) -> None:
    config = make_run(tmp_path)
    write_shard(tmp_path / "images" / "a.tar", [{"png": png(1), "txt": b"a circle"}])
    loaded = load_config(config, [setting.format(folder=tmp_path) for setting in settings])
    with pytest.raises(UserError) as error:
        preflight.check_submission(loaded, 1)
    assert words in str(error.value)


def test_a_checkpoint_takes_what_is_said(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    settings = [
        "training.steps=3", "training.sample_prompts=[]", "model.hidden_size=128", "model.num_attention_heads=4",
    ]  # fmt: skip
    assert rmoe("train", str(config), *settings)[0] == 0
    newest = list_checkpoints(tmp_path / "run")[0].path
    size = sum(file.stat().st_size for file in newest.iterdir())
    assert size == pytest.approx(preflight.checkpoint_bytes(load_config(config, settings)), rel=0.1)
    assert check(str(config), *settings).returncode == 2  # the folder holds a run
    done = check("--resume", str(tmp_path / "run"), "training.steps=9")
    assert done.returncode == 0, done.stderr
    assert "steps: 9" in done.stdout


def test_room_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(make_run(tmp_path), ["checkpoint.keep_last=2", "checkpoint.every=5"])
    size = preflight.checkpoint_bytes(config)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: Usage(0, 0, 3 * size)
    )  # two kept, one being written
    preflight.check_space(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 3 * size - 1))
    with pytest.raises(UserError, match="3 checkpoints"):
        preflight.check_space(config)
    config.training.steps = 10  # two saves in all
    preflight.check_space(config)
    (tmp_path / "run" / "checkpoints" / "step-00000005").mkdir(parents=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, size))
    preflight.check_space(config)
