"""How images are made for a benchmark: every setting has its effect, and none changes what it should not."""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.generation import ImageRequest, Sampling, build_pipeline, generate, image_seed
from rmoe_megatron.processor import ProductSeconds
from rmoe_megatron.sampling import resolve_dtype
from tests.hf.test_pipelines import recurrent_dit
from tests.support.sd3_pipeline import save_pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_pipeline(folder / "sd3")
    recurrent_dit(folder / "dit")
    return folder


def make(folder: Path, sampling: Sampling, prompts: list[str] | None = None) -> np.ndarray:
    prompts = prompts or ["two red circles", "a cat", "a cat"]
    requests = [
        ImageRequest(prompt, index, 0, folder / f"{index}.png") for index, prompt in enumerate(prompts)
    ]
    generate(requests, sampling, folder / "claims")
    assert not (folder / "claims").exists()
    return np.stack([np.asarray(Image.open(request.path)) for request in requests]).astype(int)


def test_settings_have_their_effect(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Sampling(str(models / "sd3"), 2, 7.0, 0, 2)
    base = make(tmp_path / "base", plain)
    assert (base[1] != base[2]).any()  # the same prompt with noise of its own
    assert (make(tmp_path / "again", plain) == base).all()
    for name, change in {
        "negative": {"negative_prompt": "red circles"}, "dpm": {"scheduler": "dpm"}, "interval": {"guidance_interval": (0.5, 1.0)},
        "seed": {"seed": 1},
    }.items():  # fmt: skip
        assert (make(tmp_path / name, replace(plain, **change)) != base).any(), name
    low = make(tmp_path / "bf16", replace(plain, dtype="bf16"))
    assert 0 < np.abs(low - base).mean() < 8  # of 255
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    assert np.abs(make(tmp_path / "compiled", replace(plain, compile=True)) - base).max() <= 1


def test_an_image_has_a_seed_of_its_own() -> None:
    seeds = {
        image_seed(seed, prompt, image) for seed in range(3) for prompt in range(20) for image in range(4)
    }
    assert len(seeds) == 240


def test_what_a_model_does_not_take_is_refused(models: Path, tmp_path: Path) -> None:
    dit = Sampling(str(models / "dit"), 1, 1.5, 0, 2)
    make(tmp_path / "dit", dit, ["1", "2", "0"])
    with pytest.raises(UserError, match="takes no negative prompt"):
        make(tmp_path / "negative", replace(dit, negative_prompt="3"), ["1"])
    with pytest.raises(UserError, match="no class label"):
        make(tmp_path / "label", dit, ["a cat"])
    make(tmp_path / "unipc", replace(dit, steps=2, scheduler="UniPCMultistepScheduler"), ["1"])
    for scheduler in ("FlowMatchEulerDiscreteScheduler", "AutoencoderKL", "os"):
        with pytest.raises(UserError, match=f"--scheduler {scheduler}"):
            make(tmp_path / scheduler, replace(dit, scheduler=scheduler), ["1"])
    flow = Sampling(str(models / "sd3"), 2, 7.0, 0, 2)
    make(tmp_path / "heun", replace(flow, scheduler="FlowMatchHeunDiscreteScheduler"), ["a cat"])
    with pytest.raises(UserError, match="none of rectified flow"):
        make(tmp_path / "ddpm", replace(flow, scheduler="DDPMScheduler"), ["a cat"])


@pytest.mark.parametrize(
    ("name", "gpu", "bf16_is_fast", "expected"),
    [
        ("auto", True, False, "bf16"),
        ("auto", False, True, "bf16"),
        ("auto", False, False, "fp32"),
        ("fp16", False, False, "fp16"),
        ("bf16", False, False, "bf16"),
    ],
)
def test_images_are_made_in_the_faster_data_type(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    gpu: bool,
    bf16_is_fast: bool,
    expected: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("rmoe_megatron.sampling.bf16_is_fast", lambda: bf16_is_fast)
    monkeypatch.setattr("rmoe_megatron.sampling.product_seconds", lambda: ProductSeconds(fp32=0.25, bf16=7.0))
    assert resolve_dtype(name) == expected
    is_slow = name == "bf16"
    assert ("28 times as long as in fp32; --dtype auto would take fp32" in caplog.text) is is_slow


def test_a_data_type_that_there_is_not_is_refused() -> None:
    with pytest.raises(UserError, match="--dtype fp8 must be auto, fp32, fp16 or bf16"):
        resolve_dtype("fp8")


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_all_models_of_a_pipeline_are_converted(models: Path, dtype: str, expected: torch.dtype) -> None:
    pipeline = build_pipeline(Sampling(str(models / "sd3"), 1, 7.0, 0, 1, dtype=dtype))
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            assert {parameter.dtype for parameter in component.parameters()} <= {expected}
    assert pipeline.transformer.dtype is expected
