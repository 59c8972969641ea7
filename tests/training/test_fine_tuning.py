"""Training from another run's weights: what is frozen stays, what is stored, what is exported."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file

from rmoe_megatron.checkpoint.folders import find_checkpoint
from rmoe_megatron.checkpoint.weights import CheckpointReader, RunWeights
from tests.support.commands import kill, rmoe, start
from tests.support.runs import losses, make_run

RECURRENCE = "recurrence={layers: [0, 2], num_modules: 2, steps: 2, rank: 4}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense base, trained for a few steps, and a recurrent fine-tuning of it."""
    folder = tmp_path_factory.mktemp("fine-tuning")
    config = str(make_run(folder))
    base = ["train", config, "recurrence=null", "training.steps=6", f"run_dir={folder}/base"]
    code, errors = rmoe(*base)
    assert code == 0, errors
    code, errors = rmoe(*fine_tune(folder, "recurrent", RECURRENCE))
    assert code == 0, errors
    return folder


def fine_tune(folder: Path, name: str, *overrides: str) -> list[str]:
    """The arguments of a run that starts from the base."""
    run = ["train", str(folder / "config.yaml"), f"fine_tuning.base={folder}/base", "recurrence=null"]
    short = ["training.steps=10", "training.sample_prompts=[]"]
    return [*run, f"run_dir={folder}/{name}", *short, *overrides]


def stored(run: Path) -> list[str]:
    """Names of the weights in a run's newest checkpoint."""
    keys = CheckpointReader(find_checkpoint(run)).tensors
    return [key for key in keys if not key.startswith(("optimizer.", "ema.", "rng."))]


def test_frozen_base_is_neither_trained_nor_stored(folder: Path) -> None:
    keys = CheckpointReader(find_checkpoint(folder / "recurrent")).tensors
    assert stored(folder / "recurrent")
    assert all(".recurrence." in key for key in stored(folder / "recurrent"))
    moments = [key for key in keys if key.startswith("optimizer.")]
    assert moments
    assert all(".recurrence." in key for key in moments)
    assert all(".recurrence." in key for key in keys if key.startswith("ema."))
    state = json.loads((find_checkpoint(folder / "recurrent").path / "run_state.json").read_text())
    assert state["base_fingerprint"] == RunWeights(folder / "base").fingerprint()
    base = sum(path.stat().st_size for path in find_checkpoint(folder / "base").path.glob("*.distcp"))
    modules = sum(path.stat().st_size for path in find_checkpoint(folder / "recurrent").path.glob("*.distcp"))
    assert modules < 0.3 * base
    assert len(set(losses(folder / "recurrent").values())) == 10


def test_export_joins_base_and_modules(folder: Path, tmp_path: Path) -> None:
    for run in ("base", "recurrent"):
        code, errors = rmoe("convert", "to-hf", str(folder / run), str(tmp_path / run))
        assert code == 0, errors
    name = "transformer/diffusion_pytorch_model.safetensors"
    base, recurrent = load_file(tmp_path / "base" / name), load_file(tmp_path / "recurrent" / name)
    assert all(torch.equal(recurrent[key], value) for key, value in base.items())
    up = [value for key, value in recurrent.items() if key.endswith("experts.up.weight")]
    assert len(up) == 2
    assert all(value.abs().sum() > 0 for value in up)
    config = json.loads((tmp_path / "base" / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "SD3Transformer2DModel"


def test_a_killed_fine_tuning_resumes_bitwise(folder: Path) -> None:
    run = folder / "killed"
    process = start(fine_tune(folder, "killed", RECURRENCE))
    deadline = time.monotonic() + 240
    while not (run / "checkpoints" / "step-00000005").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    kill(process)
    shutil.rmtree(run / "checkpoints" / "step-00000010", ignore_errors=True)
    code, errors = rmoe("train", "--resume", str(run))
    assert code == 0, errors
    assert losses(run) == losses(folder / "recurrent")


def test_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    arguments = ["train", str(folder / "config.yaml"), "recurrence=null", "training.steps=3", "seed=1"]
    code, errors = rmoe(*arguments, f"run_dir={other}")
    assert code == 0, errors
    code, errors = rmoe(
        "convert", "to-hf", str(folder / "recurrent"), str(tmp_path / "out"), "--base", str(other)
    )
    assert code == 2
    assert "fingerprints differ" in errors
    assert "Traceback" not in errors
    shutil.copytree(folder / "recurrent", tmp_path / "run")
    arguments = ["train", "--resume", str(tmp_path / "run"), "training.steps=12"]
    code, errors = rmoe(*arguments, f"fine_tuning.base={other}")
    assert code == 2
    assert "fingerprints differ" in errors
    assert "Traceback" not in errors


def test_a_base_brings_its_model(folder: Path, tmp_path: Path) -> None:
    """The model, the encoders and what the base has learned need not be copied: the same run as with all of it."""
    config = tmp_path / "short.yaml"
    text = (folder / "config.yaml").read_text()
    kept = [
        line
        for line in text.splitlines()
        if line.split(":")[0] in ("device", "data", "optimizer", "checkpoint")
    ]
    training = text[text.index("training:") : text.index("checkpoint:")]
    config.write_text("\n".join([*kept, training, f"fine_tuning: {{base: {folder}/base}}"]))
    assert "model:" not in config.read_text()
    short = ["training.steps=10", "training.sample_prompts=[]", f"run_dir={tmp_path}/run", RECURRENCE]
    code, errors = rmoe("train", str(config), *short)
    assert code == 0, errors
    assert losses(tmp_path / "run") == losses(folder / "recurrent")


def test_another_architecture_is_refused(folder: Path) -> None:
    code, errors = rmoe(*fine_tune(folder, "wider", RECURRENCE, "model.hidden_size=64"))
    assert code == 2
    assert "another architecture" in errors
    assert "Traceback" not in errors


def test_only_the_chosen_blocks_are_trained(folder: Path) -> None:
    overrides = ["fine_tuning.trainable=blocks", "fine_tuning.blocks=[1]"]
    code, errors = rmoe(*fine_tune(folder, "blocks", *overrides))
    assert code == 0, errors
    assert all(key.startswith("transformer.layers.1.") for key in stored(folder / "blocks"))
    before, after = RunWeights(folder / "base"), RunWeights(folder / "blocks")
    for name, location in before.locations.items():
        same = torch.equal(location.read(), after.locations[name].read())
        assert same or name.startswith("transformer.layers.1."), name
    assert not same_weights(before, after, "transformer.layers.1.attention.linear_qkv.weight")


def same_weights(before: RunWeights, after: RunWeights, name: str) -> bool:
    return torch.equal(before.locations[name].read(), after.locations[name].read())


def test_everything_can_be_trained(folder: Path) -> None:
    code, errors = rmoe(*fine_tune(folder, "all", "fine_tuning.trainable=all"))
    assert code == 0, errors
    assert set(stored(folder / "all")) == set(stored(folder / "base"))
    first, base = losses(folder / "all")[1], losses(folder / "base")[1]
    assert first < base  # it starts from trained weights


def test_lora_is_merged_at_export(folder: Path, tmp_path: Path) -> None:
    code, errors = rmoe(*fine_tune(folder, "lora", "lora={layers: [1], rank: 4}"))
    assert code == 0, errors
    assert stored(folder / "lora") == [
        "transformer.layers.1.lora.down",
        "transformer.layers.1.lora.up",
    ]
    for run in ("base", "lora"):
        code, errors = rmoe("convert", "to-hf", str(folder / run), str(tmp_path / run))
        assert code == 0, errors
    name = "transformer/diffusion_pytorch_model.safetensors"
    base, adapted = load_file(tmp_path / "base" / name), load_file(tmp_path / "lora" / name)
    weights = RunWeights(folder / "lora").locations
    down = weights["transformer.layers.1.lora.down"].read().view(3, 4, 32)
    up = weights["transformer.layers.1.lora.up"].read()
    for index, part in enumerate("qkv"):
        key = f"transformer_blocks.1.attn.to_{part}.weight"
        torch.testing.assert_close(adapted.pop(key), base.pop(key) + up[index] @ down[index])
        assert up[index].abs().sum() > 0
    assert all(torch.equal(adapted[key], value) for key, value in base.items())
    code, errors = rmoe("convert", "to-lora", str(folder / "lora"), str(tmp_path / "factors"))
    assert code == 0, errors
    check_factors(tmp_path)
    code, errors = rmoe("convert", "to-single-file", str(folder / "lora"), str(tmp_path / "lora.safetensors"))
    assert code == 0, errors
    converted = convert_sd3_transformer_checkpoint_to_diffusers(load_file(tmp_path / "lora.safetensors"))
    merged = load_file(tmp_path / "lora" / name)
    assert converted.keys() == merged.keys()
    assert all(torch.equal(converted[key], value) for key, value in merged.items())


def test_the_original_layout_has_no_place_for_recurrence(folder: Path, tmp_path: Path) -> None:
    code, errors = rmoe(
        "convert", "to-single-file", str(folder / "recurrent"), str(tmp_path / "out.safetensors")
    )
    assert code == 2
    assert "The original layout has no place for recurrence of" in errors
    assert not (tmp_path / "out.safetensors").exists()


def check_factors(folder: Path) -> None:
    """PEFT's names; the base's weights with the product of the factors are the merged ones, in float64 within float32's rounding."""
    path, name = (
        folder / "factors" / "pytorch_lora_weights.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
    )
    factors, base, merged = (
        load_file(path),
        load_file(folder / "base" / name),
        load_file(folder / "lora" / name),
    )
    modules = [f"transformer_blocks.1.attn.to_{part}" for part in "qkv"]
    assert factors.keys() == {
        f"transformer.{module}.lora_{letter}.weight" for module in modules for letter in "AB"
    }
    for module in modules:
        down, up = (factors[f"transformer.{module}.lora_{letter}.weight"].double() for letter in "AB")
        assert (down.shape, up.shape) == ((4, 32), (32, 4))
        expected = base[f"{module}.weight"].double() + up @ down
        torch.testing.assert_close(merged[f"{module}.weight"].double(), expected, rtol=1e-6, atol=1e-7)
    with safe_open(path, "pt") as file:
        record = file.metadata()
    assert (record["format"], record["run"], record["step"], record["base"]) == ("pt", "lora", "10", "base")
    assert record["trainable"] == "added"
    assert json.loads(record["recipe"])["lora"] == {"layers": [1], "rank": 4}
    with safe_open(folder / "lora" / name, "pt") as file:
        assert file.metadata() == record
    with safe_open(folder / "base" / name, "pt") as file:
        assert (file.metadata()["run"], file.metadata()["step"], file.metadata().get("base")) == (
            "base",
            "6",
            None,
        )


def test_what_has_no_lora_is_refused(folder: Path, tmp_path: Path) -> None:
    code, errors = rmoe("convert", "to-lora", str(folder / "recurrent"), str(tmp_path / "out"))
    assert code == 2
    assert "has no LoRA; `rmoe convert to-hf" in errors
    assert not (tmp_path / "out").exists()


def test_a_base_with_another_prediction_is_refused(folder: Path) -> None:
    code, errors = rmoe(*fine_tune(folder, "sample", RECURRENCE, "diffusion.prediction=sample"))
    assert code == 2
    assert "has learned diffusion.prediction=velocity" in errors
    assert "Traceback" not in errors
