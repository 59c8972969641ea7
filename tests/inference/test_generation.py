"""How images are made for a benchmark: every setting has its effect, and none changes what it should not."""

import functools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from rmoe_megatron.distributed.processor import ProductSeconds
from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.dpg.evaluate import _device
from rmoe_megatron.evaluation.geneval.evaluate import Settings as GenEvalSettings
from rmoe_megatron.evaluation.geneval.evaluate import _load_judges
from rmoe_megatron.evaluation.question_answering import Qwen3VL
from rmoe_megatron.evaluation.workspace import plan
from rmoe_megatron.hf import PixelCodec
from rmoe_megatron.inference.generation import ImageRequest, Sampling, build_pipeline, generate, image_seed
from rmoe_megatron.inference.sampling import (
    _of_class,
    describe_place,
    open_pipeline,
    resolve_dtype,
    sample_images,
)
from tests.hf.test_pipelines import dit_pipeline, recurrent_dit
from tests.support.sd3_pipeline import save_pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_pipeline(folder / "sd3")
    recurrent_dit(folder / "dit")
    return folder


def make(folder: Path, sampling: Sampling, prompts: list[str] | None = None) -> np.ndarray:
    prompts = prompts or ["two red circles", "a cat", "a cat"]
    pictures, _ = plan(
        lambda images: [
            ImageRequest(prompt, index, 0, images / f"{index}.png") for index, prompt in enumerate(prompts)
        ],
        sampling,
        folder,
    )
    generate([(sampling, pictures)], folder / "claims")
    assert not (folder / "claims").exists()
    return np.stack([np.asarray(Image.open(each.request.path)) for each in pictures]).astype(int)


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


@pytest.mark.parametrize(
    ("model", "scheduler"),
    [
        ("dit", "DDPMScheduler"),
        ("dit", "EulerAncestralDiscreteScheduler"),
        ("sd3", "FlowMatchLCMScheduler"),
        ("sd3", "dpm"),
    ],
)
def test_an_image_depends_on_its_seed_alone_also_with_stochastic_samplers(
    models: Path, tmp_path: Path, model: str, scheduler: str
) -> None:
    """Whatever it is made together with: kernels for other numbers of rows differ in the last bit, here by one level of 255."""
    prompts = ["7", "12", "3"] if model == "dit" else ["two red circles", "a cat", "a dog"]
    sampling = Sampling(str(models / model), 3, 2.0, 5, 3, scheduler=scheduler)
    together = make(tmp_path / "together", sampling, prompts)
    torch.manual_seed(99)  # the state of the process is nothing to it
    assert (make(tmp_path / "again", sampling, prompts) == together).all()
    alone = make(tmp_path / "alone", replace(sampling, batch_size=1), prompts)
    assert np.abs(alone - together).max() <= 1
    assert np.abs(make(tmp_path / "seed", replace(sampling, seed=6), prompts) - together).max() > 1


def test_a_sampler_that_no_seed_reaches_is_refused() -> None:
    class OwnNoiseScheduler:  # as diffusers' DPMSolverSDEScheduler, which needs torchsde
        def __init__(
            self, prediction_type: str = "epsilon", noise_sampler_seed: int | None = None
        ) -> None: ...

    with pytest.raises(UserError, match="OwnNoiseScheduler draws noise of its own"):
        _of_class(OwnNoiseScheduler, {}, None)


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
    monkeypatch.setattr("rmoe_megatron.inference.sampling.bf16_is_fast", lambda: bf16_is_fast)
    monkeypatch.setattr(
        "rmoe_megatron.inference.sampling.product_seconds", lambda: ProductSeconds(fp32=0.25, bf16=7.0)
    )
    assert resolve_dtype(name) == expected
    is_slow = name == "bf16"
    assert ("28 times as long as in fp32; --dtype auto would take fp32" in caplog.text) is is_slow


def test_a_data_type_that_there_is_not_is_refused() -> None:
    with pytest.raises(UserError, match="--dtype fp8 must be auto, fp32, fp16 or bf16"):
        resolve_dtype("fp8")


@pytest.mark.parametrize(
    ("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_models_of_a_pipeline_are_converted_as_transformers_does(
    models: Path, dtype: str, expected: torch.dtype
) -> None:
    pipeline = build_pipeline(Sampling(str(models / "sd3"), 1, 7.0, 0, 1, dtype=dtype))
    for name, component in pipeline.components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        own = {key: tensor.dtype for key, tensor in component.named_parameters()}
        if isinstance(component, PreTrainedModel):
            loaded = type(component).from_pretrained(models / "sd3" / name, dtype=expected)
            assert own == {key: tensor.dtype for key, tensor in loaded.named_parameters()}
        else:
            assert set(own.values()) == {expected}
    # T5's outputs of feed-forward layers go beyond float16.
    wide = dict(pipeline.text_encoder_3.named_parameters())[
        "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    ]
    assert wide.dtype is (torch.bfloat16 if dtype == "bf16" else torch.float32)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with one GPU that nothing can be computed on; returns where pipelines are moved to."""
    moves: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(DiffusionPipeline, "to", lambda self, *where: moves.append(str(where[0])))
    return moves


def test_a_pipeline_is_moved_to_the_gpu_of_its_rank(models: Path, one_gpu: list[str]) -> None:
    open_pipeline(models / "sd3", "fp32")
    assert one_gpu == ["cuda:0"]
    assert describe_place("bf16") == "on GPU 0 in bf16"


def test_a_rank_without_a_gpu_of_its_own_gets_the_sentence_of_training(
    models: Path, one_gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    settings = GenEvalSettings(models, detector="nowhere", clip="nowhere")
    for use in (
        lambda: open_pipeline(models / "sd3", "fp32"),
        lambda: _load_judges(settings),
        lambda: Qwen3VL(str(models)),
        _device,
    ):
        with pytest.raises(
            UserError, match=r"Rank 1 of this host finds 1 GPU\(s\); start one task for each GPU"
        ):
            use()
    assert one_gpu == []


def damaged(models: Path, folder: Path, name: str, value: float) -> Path:
    """A copy of the SD3 folder with one value of the transformer changed."""
    shutil.copytree(models / "sd3", folder)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("value", "dtype", "is_held"), [(1e5, "fp16", False), (1e5, "bf16", True), (float("nan"), "fp32", False)]
)
def test_weights_that_a_data_type_does_not_hold_are_named(
    models: Path, tmp_path: Path, value: float, dtype: str, is_held: bool
) -> None:
    folder = damaged(models, tmp_path / "model", "proj_out.bias", value)
    if is_held:
        open_pipeline(folder, dtype)
        return
    with pytest.raises(
        UserError,
        match=f"transformer of .*model has 1 values in proj_out.bias that are not finite in {dtype}",
    ):
        open_pipeline(folder, dtype)


def test_images_that_are_not_finite_are_not_written(models: Path, tmp_path: Path) -> None:
    folder = damaged(models, tmp_path / "model", "proj_out.bias", 3e38)  # finite, but no image comes of it
    with pytest.raises(
        UserError, match="makes 2 of 2 images with values that are not finite, of 'two red circles' for one"
    ):
        make(tmp_path / "out", Sampling(str(folder), 2, 7.0, 0, 2))
    assert not list((tmp_path / "out").rglob("*.png"))


def test_infinite_latents_of_pixels_are_no_white_image(models: Path) -> None:
    pipeline = dit_pipeline(is_flow=True)
    pipeline.register_modules(vae=PixelCodec(latent_channels=4))
    pipeline.build_image_processor()
    pipeline.vae.decode = lambda latents, return_dict: (latents[:, :3],)
    with torch.no_grad():
        pipeline.transformer.proj_out_2.bias.fill_(3e38)
    with pytest.raises(UserError, match="makes 1 of 1 images with values that are not finite"):
        sample_images(pipeline, ["1"], [0], 2, 4.0, 1)
