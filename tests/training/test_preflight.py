"""What is checked where a job is submitted: no GPU, no Megatron-Core, nothing downloaded."""

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from rmoe_megatron.checkpoint.folders import checkpoint_path, list_checkpoints
from rmoe_megatron.checkpoint.size import checkpoint_bytes
from rmoe_megatron.config.loading import load_config, save_config
from rmoe_megatron.errors import UserError
from rmoe_megatron.training import preflight
from rmoe_megatron.training.encoder_shapes import check_encoders_fit
from tests.data.test_pack import picture
from tests.data.test_shards import png
from tests.support.commands import rmoe
from tests.support.runs import make_run, write_shard
from tests.support.sd3_pipeline import save_pipeline
from tests.training.test_dit_training import CONFIG as DIT_CONFIG

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
    assert (
        "# memory is not counted: this machine has no GPU, so name that of the run with --gpu\n"
        in done.stdout
    )
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
        (["model.text_hidden_size=48"], "minilm needs model.text_hidden_size=384, but it is 48"),
        (["model.in_channels=4"], "pixel gives latents of 3 channels, but model.in_channels is 4"),
        (["fine_tuning.base={folder}/nowhere"], "fine_tuning.base {folder}/nowhere, which is no folder"),
        (["fine_tuning.base={folder}/data"], "fine_tuning.base {folder}/data, which has no checkpoint"),
        (["fine_tuning.base={folder}/base"], "its model.hidden_size is 32, this run asks for 64"),
        (["training.steps=1000000000", "checkpoint.keep_last=1000000", "checkpoint.every=1"], "of free disk"),
    ],
)
def test_what_a_job_would_find_out_too_late(tmp_path: Path, settings: list[str], words: str) -> None:
    config = make_run(tmp_path)
    write_shard(tmp_path / "images" / "a.tar", [{"png": png(1), "txt": b"a circle"}])
    if "fine_tuning" in settings[0]:
        make_base(tmp_path / "base", config)
        settings = [*settings, "model.hidden_size=64"]
    loaded = load_config(config, [setting.format(folder=tmp_path) for setting in settings])
    with pytest.raises(UserError) as error:
        preflight.check_submission(loaded, 1)
    assert words.format(folder=tmp_path) in str(error.value)


def make_base(folder: Path, config: Path, *settings: str) -> None:
    """What a check reads of a run: the configuration of its checkpoint."""
    checkpoint = checkpoint_path(folder, 7)
    checkpoint.mkdir(parents=True)
    save_config(load_config(config, [*settings]), checkpoint / "config.yaml")


def test_a_base_has_learned_what_the_run_asks_for(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    make_base(tmp_path / "base", config, "diffusion.prediction=sample")
    base = f"fine_tuning.base={tmp_path}/base"
    for check_it in (
        preflight.check,
        preflight.check_submission,
    ):  # where a job is submitted, and where it starts
        with pytest.raises(
            UserError, match="has learned diffusion.prediction=sample, this run asks for velocity"
        ):
            check_it(load_config(config, [base]), 1)
        # Another resolution is none of the weights' business.
        check_it(load_config(config, [base, "diffusion.prediction=sample"]), 1)


def test_the_three_encoders_of_sd3_are_compared_with_the_model(tmp_path: Path) -> None:
    """Widths of the pipeline that diffusers has saved: T5's 48, 12 + 16 of the CLIPs' projections."""
    save_pipeline(tmp_path / "sd3")
    config = make_run(tmp_path)
    settings = [
        f"encoders.text_encoder={tmp_path}/sd3",
        "model.text_length=83",
        "model.text_hidden_size=48",
        "model.pooled_size=28",
    ]
    check_encoders_fit(load_config(config, settings))
    for wrong, words in (
        ("model.text_hidden_size=64", "needs model.text_hidden_size=48, but it is 64"),
        ("model.pooled_size=12", "needs model.pooled_size=28, but it is 12"),
        ("model.text_length=77", "model.text_length is 77"),
        (f"encoders.autoencoder={tmp_path}/sd3", "gives latents of 4 channels, but model.in_channels is 3"),
    ):
        with pytest.raises(UserError) as error:
            check_encoders_fit(load_config(config, [*settings, wrong]))
        assert words in str(error.value)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_batch_is_loaded_of_training_and_of_validation(tmp_path: Path, split: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(DIT_CONFIG.format(folder=tmp_path))
    for name in ("train", "val"):
        labels = [0, 1, 99 if name == split else 2, 3]  # the first sample says nothing of the third
        samples = [{"png": picture(1, "png", size=(8, 8)), "cls": str(label).encode()} for label in labels]
        write_shard(tmp_path / "data" / name / "a.tar", samples)
    with pytest.raises(UserError, match=f"Sample 000002 of {tmp_path}/data/{split} has class 99"):
        preflight.check_submission(load_config(config, []), 1)


def test_shards_behind_the_first_are_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another shape in the last one is refused; what is no archive is passed over with a warning, as in training; a link to nowhere is named."""
    config = make_run(tmp_path)
    (tmp_path / "other").mkdir()
    make_run(tmp_path / "other", side=4)
    last, junk = (
        tmp_path / "data" / "train" / "train-000009.tar",
        tmp_path / "data" / "train" / "train-000003.tar",
    )
    preflight.check_submission(load_config(config, []), 1)
    assert caplog.text == ""
    shutil.copy(tmp_path / "other" / "data" / "train" / "train-000000.tar", last)
    with pytest.raises(UserError, match=f"latents from {last} has shape"):
        preflight.check_submission(load_config(config, []), 1)
    last.unlink()
    junk.write_bytes(b"no archive" * 100)
    preflight.check_submission(load_config(config, []), 1)
    assert f"Shard {junk} is no tar archive" in caplog.text
    junk.unlink()
    junk.symlink_to(tmp_path / "nowhere.tar")
    with pytest.raises(UserError, match=f"The shard {junk} cannot be read"):
        preflight.check_submission(load_config(config, []), 1)


def test_the_check_of_a_resumed_run_is_that_of_its_start(tmp_path: Path) -> None:
    config, settings = (
        make_run(tmp_path),
        ["training.steps=2", "training.sample_prompts=[]", "optimizer.warmup_steps=1"],
    )
    assert rmoe("train", str(config), *settings)[0] == 0
    for override, words in (
        ("recurrence.rank=5", "another architecture (recurrence differs"),
        ("precision=bf16", "was trained with precision=fp32"),
    ):
        done = check("--resume", str(tmp_path / "run"), override)
        assert done.returncode == 2
        assert words in done.stderr


def test_a_checkpoint_takes_what_is_said(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    settings = [
        "training.steps=3", "training.sample_prompts=[]", "model.hidden_size=128", "model.num_attention_heads=4",
    ]  # fmt: skip
    assert rmoe("train", str(config), *settings)[0] == 0
    newest = list_checkpoints(tmp_path / "run")[0].path
    size = sum(file.stat().st_size for file in newest.iterdir())
    assert size == pytest.approx(checkpoint_bytes(load_config(config, settings)), rel=0.1)
    assert check(str(config), *settings).returncode == 2  # the folder holds a run
    done = check("--resume", str(tmp_path / "run"), "training.steps=9")
    assert done.returncode == 0, done.stderr
    assert "steps: 9" in done.stdout


def test_room_for_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(make_run(tmp_path), ["checkpoint.keep_last=2", "checkpoint.every=5"])
    size = checkpoint_bytes(config)
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
