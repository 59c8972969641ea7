"""Exported folders: stock diffusers pipelines, ours, code carried along; whole sampling trajectories."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
)

from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.config.model import Architecture, DiffusionConfig, ModelConfig, Objective
from rmoe_megatron.config.run import ParallelConfig, RunConfig
from rmoe_megatron.conversion.export import build_pipeline, export_run, write_pipeline
from rmoe_megatron.conversion.remote_code import add_remote_code
from rmoe_megatron.conversion.weight_names import to_diffusers
from rmoe_megatron.data.batch import Conditions, Prompts
from rmoe_megatron.errors import UserError
from rmoe_megatron.hf import (
    RecurrentDiTPipeline,
    RecurrentDiTTransformer2DModel,
    RecurrentSD3Transformer2DModel,
)
from rmoe_megatron.inference.sampling import sample_images, set_scheduler
from rmoe_megatron.pretrained.architecture import transformer_arguments, transformer_class
from tests.support.configurations import RECURRENCE, one_rank, randomise, tiny_config
from tests.support.diffusers_models import ARCHITECTURES, make_model
from tests.support.sd3_pipeline import TEXT_LENGTH, make_pipeline, save_pipeline

DIT_RECURRENCE = {
    "layers": [1],
    "num_modules": 2,
    "steps": 2,
    "rank": 4,
    "modulation": True,
    "gate_inputs": ["tokens"],
}


def import_folder(folder: Path, run: Path, text_length: int = TEXT_LENGTH) -> RunConfig:
    from rmoe_megatron.conversion.importing import import_diffusers

    import_diffusers(folder, run, text_length, ParallelConfig())
    return RunWeights(run).config


def sample(pipeline: Any, **arguments: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(num_inference_steps=3, generator=generator, output_type="np", **arguments).images


def test_a_stock_sd3_folder_comes_back_as_one(tmp_path: Path) -> None:
    original = save_pipeline(tmp_path / "sd3")
    config = import_folder(tmp_path / "sd3", tmp_path / "run")
    assert config.diffusion.shift == 3.0
    assert config.encoders.text_encoder == str(tmp_path / "sd3")
    export_run(tmp_path / "run", tmp_path / "out")
    exported = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out")
    arguments = {"prompt": "two red circles", "height": 16, "width": 16, "max_sequence_length": 6}
    assert np.abs(sample(exported, **arguments) - sample(original, **arguments)).max() < 1e-5
    assert type(exported.transformer).__name__ == "SD3Transformer2DModel"


def recurrent_sd3(folder: Path) -> None:
    """A stock pipeline's folder with a recurrent transformer."""
    pipeline = make_pipeline()
    settings = {**DIT_RECURRENCE, "layers": [0, 2]}
    transformer = RecurrentSD3Transformer2DModel.from_config(pipeline.transformer.config, recurrence=settings)
    randomise(transformer, std=0.1)
    pipeline.register_modules(transformer=transformer.eval())
    pipeline.save_pretrained(folder)


def recurrent_dit(folder: Path) -> None:
    """DiTPipeline's folder with a recurrent transformer, the original's timestep features and ImageNet's classes."""
    arguments = ARCHITECTURES["dit"][1] | {"num_embeds_ada_norm": 1000, "downscale_freq_shift": 0.0}
    transformer = RecurrentDiTTransformer2DModel(**arguments, recurrence=DIT_RECURRENCE)
    randomise(transformer, std=0.1)
    vae = make_pipeline(shift_factor=0.0).vae
    vae.register_to_config(shift_factor=None)
    DiTPipeline(transformer.eval(), vae, DDIMScheduler(clip_sample=False)).save_pretrained(folder)


SD3_CALL = {"prompt": "two red circles", "height": 16, "width": 16, "max_sequence_length": 6}
# Exports with a class of this package: inside diffusers' own pipelines, and in ours -> how they are called.
EXPORTS: dict[str, dict[str, Any]] = {
    "stock-sd3": SD3_CALL,
    "stock-dit": {"class_labels": [3, 999]},
    "own-sd3": {"prompt": ["two red circles", "a cat"], "guidance_scale": 2.0, "height": 4, "width": 8},
    "own-dit": {"class_labels": [3, 5]},
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For every export a folder with the exports ``package`` and ``code`` (with its code) and ``expected.npy``."""
    folder = tmp_path_factory.mktemp("exports")
    for name, call in EXPORTS.items():
        make = export_stock if name.startswith("stock") else export_own
        np.save(folder / f"{name}.npy", sample(make(name, folder / name), **call))
    return folder


def export_stock(name: str, folder: Path) -> DiffusionPipeline:
    """Import a folder of diffusers' own pipeline with a recurrent transformer and export it; returns the original."""
    make = recurrent_sd3 if name == "stock-sd3" else recurrent_dit
    make(folder / "original")
    import_folder(folder / "original", folder / "run")
    export_run(folder / "run", folder / "package")
    export_run(folder / "run", folder / "code", remote_code=True)
    return DiffusionPipeline.from_pretrained(folder / "original")


def export_own(name: str, folder: Path) -> DiffusionPipeline:
    """Pipeline, transformer and pixel codec are classes of this package."""
    config = trajectory_config("mmdit" if name == "own-sd3" else "dit-ddpm")
    transformer = transformer_class(config)(**transformer_arguments(config)).eval()
    randomise(transformer, std=0.1)
    for target in (folder / "package", folder / "code"):
        transformer.save_pretrained(target / "transformer")
        write_pipeline(config, transformer, target)
    add_remote_code(folder / "code")
    return build_pipeline(config, transformer)


@pytest.mark.parametrize("name", EXPORTS)
def test_diffusers_loads_an_export_and_what_is_saved_of_it(name: str, exports: Path, tmp_path: Path) -> None:
    """With this package imported."""
    expected, folder = np.load(exports / f"{name}.npy"), exports / name / "package"
    for again in ("again", "once-more"):
        pipeline = DiffusionPipeline.from_pretrained(folder)
        assert type(pipeline.transformer).__name__.startswith("Recurrent")
        assert np.abs(sample(pipeline, **EXPORTS[name]) - expected).max() < 1e-5
        folder = tmp_path / again
        pipeline.save_pretrained(folder, max_shard_size="40KB")
        assert len(list((folder / "transformer").glob("*.safetensors"))) > 1


def test_images_of_another_size(exports: Path) -> None:
    for name in ("own-sd3", "stock-sd3"):
        pipeline = DiffusionPipeline.from_pretrained(exports / name / "package")
        unit = pipeline.vae_scale_factor * pipeline.transformer.config.patch_size
        size = Bucket(2 * unit, unit)
        images = sample_images(pipeline, ["a cat"] * 2, [0, 1], 2, 2.0, 2, size=size)
        assert images.shape == (2, unit, 2 * unit, 3)
        for wrong in (Bucket(2 * unit + 1, unit), Bucket(1000 * unit, unit)):
            with pytest.raises(
                UserError, match=f"--size {wrong} is none of this model's: sides are multiples of {unit}"
            ):
                sample_images(pipeline, ["a cat"], [0], 2, 2.0, 1, size=wrong)
    with pytest.raises(UserError, match="images of one size"):
        sample_images(dit_pipeline(), ["1"], [0], 2, 2.0, 1, size=Bucket(8, 8))


def test_code_is_carried_from_folder_to_folder_without_this_package(exports: Path, tmp_path: Path) -> None:
    """In a process that cannot import this package, and forgets the code of a folder before it loads the next."""
    script = f"""
import importlib, os, shutil, sys
sys.modules["rmoe_megatron"] = None  # importing it fails from here on
import numpy as np, torch
from diffusers import DiffusionPipeline
from diffusers.utils import HF_MODULES_CACHE
for name, call in {EXPORTS!r}.items():
    folder, expected = f"{exports}/{{name}}/code", np.load(f"{exports}/{{name}}.npy")
    try:
        DiffusionPipeline.from_pretrained(folder)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise AssertionError("code was run without being asked for")
    for again in range(3):
        pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images = pipeline(**call, num_inference_steps=3, generator=generator, output_type="np").images
        assert np.abs(images - expected).max() < 1e-5, f"images of {{folder}} differ"
        folder = f"{tmp_path}/{{name}}-{{again}}"
        pipeline.save_pretrained(folder)
        for module in [module for module in sys.modules if module.startswith("diffusers_modules")]:
            del sys.modules[module]
        shutil.rmtree(os.path.join(HF_MODULES_CACHE, "diffusers_modules"))
        importlib.invalidate_caches()
"""
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=200, cwd=tmp_path, env=environment)


def trajectory(pipeline: Any, latents: torch.Tensor, **arguments: Any) -> list[torch.Tensor]:
    """Latents after each of ten steps."""
    states: list[torch.Tensor] = []

    def keep(_: Any, __: int, ___: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        states.append(tensors["latents"])
        return tensors

    pipeline.set_progress_bar_config(disable=True)
    pipeline(latents=latents, num_inference_steps=10, guidance_scale=2.0, callback_on_step_end=keep,
             output_type="latent", **arguments)  # fmt: skip
    return states


@pytest.mark.parametrize(
    ("kind", "size"), [("mmdit", (8, 8)), ("mmdit", (4, 8)), ("dit-ddpm", (8, 8)), ("dit-flow", (8, 8))]
)
def test_pipeline_equals_the_training_model_along_a_trajectory(
    kind: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rmoe_megatron.model.build import build_transformer
    from rmoe_megatron.training import sample_grid

    config = trajectory_config(kind)
    config.training.sample_steps = 10
    prompts = ["two red circles", "a cat"] if kind == "mmdit" else ["1", "6"]
    ours: list[torch.Tensor] = []
    with one_rank(config) as device, torch.no_grad():
        from rmoe_megatron.encoders.conditions import build_condition_encoder

        model = build_transformer(config).eval()
        randomise(model, std=0.1)
        transformer = transformer_class(config)(**transformer_arguments(config)).eval()
        transformer.load_state_dict(to_diffusers(model.state_dict(), config.model))
        encoder = build_condition_encoder(config, device)
        first: list[torch.Tensor] = []

        def recorded(latents: torch.Tensor, timestep: Any, keys: Any, conditions: Conditions) -> torch.Tensor:
            (ours if first else first).append(latents.chunk(2)[0])
            return model(latents, timestep, keys, **conditions.tensors())

        embedded = Prompts(prompts, encoder.encode_prompts(prompts), encoder.null)
        ours_last = sample_grid.sample_latents(recorded, embedded, config, *size)
    pipeline = build_pipeline(config, transformer)
    inputs = {"prompt": prompts} if kind == "mmdit" else {"class_labels": [int(label) for label in prompts]}
    theirs = trajectory(pipeline, first[0], **inputs)
    assert len(theirs) == len([*ours, ours_last]) == 10
    for step, (actual, expected) in enumerate(zip(theirs, [*ours, ours_last], strict=True)):
        assert (actual - expected).norm() / expected.norm() < 1e-5, f"step {step}"


def trajectory_config(kind: str) -> RunConfig:
    if kind == "mmdit":
        config = tiny_config(RECURRENCE)
        return replace(
            config,
            model=replace(config.model, text_hidden_size=384, pooled_size=384),
            diffusion=DiffusionConfig(shift=3.0),
        )
    is_ddpm = kind == "dit-ddpm"
    model = ModelConfig(
        architecture=Architecture.dit, sample_size=8, patch_size=2, in_channels=3, num_layers=3, hidden_size=32,
        num_attention_heads=2, qk_norm=False, num_classes=7, learned_sigma=is_ddpm,
    )  # fmt: skip
    objective = Objective.ddpm if is_ddpm else Objective.rectified_flow
    return tiny_config(RECURRENCE, model=model, diffusion=DiffusionConfig(objective=objective))


def dit_pipeline(is_flow: bool = False) -> RecurrentDiTPipeline:
    pipeline = make_pipeline()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0) if is_flow else DDIMScheduler(clip_sample=False)
    ours = RecurrentDiTPipeline(make_model("dit"), pipeline.vae, scheduler)
    ours.set_progress_bar_config(disable=True)
    return ours


def test_our_dit_pipeline_equals_diffusers() -> None:
    """Where both apply: 1000 classes, DDPM and an autoencoder without shift."""
    arguments = ARCHITECTURES["dit"][1] | {"num_embeds_ada_norm": 1000}
    transformer = ARCHITECTURES["dit"][0](**arguments).eval()
    randomise(transformer, std=0.1)
    vae: AutoencoderKL = make_pipeline(shift_factor=0.0).vae
    theirs = DiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False))
    ours = RecurrentDiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False))
    call = {"class_labels": [3, 500], "guidance_scale": 3.0}
    assert np.abs(sample(ours, **call) - sample(theirs, **call)).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "is_flow", "expected"),
    [
        ("euler", True, FlowMatchEulerDiscreteScheduler),
        ("dpm", True, DPMSolverMultistepScheduler),
        ("ddim", False, DDIMScheduler),
        ("dpm", False, DPMSolverMultistepScheduler),
    ],
)
def test_schedulers(name: str, is_flow: bool, expected: type) -> None:
    pipeline = dit_pipeline(is_flow)
    set_scheduler(pipeline, name)
    assert isinstance(pipeline.scheduler, expected)
    together = sample_images(pipeline, ["1", "2", "3"], [5, 6, 7], steps=4, guidance=2.0, batch_size=3)
    alone = sample_images(pipeline, ["1", "2", "3"], [5, 6, 7], steps=4, guidance=2.0, batch_size=1)
    assert abs(together.astype(int) - alone.astype(int)).max() <= 1
    assert (together[0] != together[1]).any()


def test_the_shift_survives_every_change_of_scheduler(tmp_path: Path) -> None:
    """Also of a scheduler that comes from a folder; the sigmas of Euler with this shift are the original ones."""
    pipeline = dit_pipeline(is_flow=True)
    pipeline.scheduler.set_timesteps(5)
    expected = pipeline.scheduler.sigmas
    for name in ("dpm", "dpm", "euler", "euler", "dpm", "euler"):
        set_scheduler(pipeline, name)
        pipeline.scheduler.save_pretrained(tmp_path / name)
        pipeline.scheduler = type(pipeline.scheduler).from_pretrained(tmp_path / name)
        shift = pipeline.scheduler.config["flow_shift" if name == "dpm" else "shift"]
        assert shift == 2.0, name
    pipeline.scheduler.set_timesteps(5)
    assert torch.equal(pipeline.scheduler.sigmas, expected)


def test_the_shift_of_a_flow_dpm_folder_is_imported(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    set_scheduler(pipeline, "dpm")
    pipeline.save_pretrained(tmp_path / "sd3")
    assert import_folder(tmp_path / "sd3", tmp_path / "run").diffusion.shift == 3.0


@pytest.mark.parametrize(("name", "is_flow"), [("ddim", True), ("euler", False), ("magic", True)])
def test_a_scheduler_of_another_objective_is_refused(name: str, is_flow: bool) -> None:
    with pytest.raises(UserError, match=f"--scheduler {name} does not fit"):
        set_scheduler(dit_pipeline(is_flow), name)


def test_dpm_solver_approaches_euler_with_more_steps() -> None:
    """Both integrate the same flow: many steps of either meet."""
    fine = dit_pipeline(is_flow=True)
    with torch.no_grad():
        for parameter in fine.transformer.parameters():
            parameter.mul_(0.5)
    call = {"class_labels": [1], "guidance_scale": 1.0, "output_type": "latent"}
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    euler = fine(latents=latents, num_inference_steps=400, **call).images
    set_scheduler(fine, "dpm")
    dpm = fine(latents=latents, num_inference_steps=100, **call).images
    assert (dpm - euler).norm() / euler.norm() < 0.02


def test_guidance_interval() -> None:
    """Outside the interval the images are those without guidance, in our pipelines and in diffusers'."""
    for pipeline, prompts in ((dit_pipeline(), ["1", "2"]), (make_pipeline(), ["a cat", "two red circles"])):
        pipeline.set_progress_bar_config(disable=True)

        def images(guidance: float, interval: tuple[float, float] = (0.0, 1.0)) -> np.ndarray:
            found = sample_images(pipeline, prompts, [5, 6], 3, guidance, 2, guidance_interval=interval)  # noqa: B023
            return found.astype(int)

        unguided, guided = images(1.0), images(4.0)
        assert np.abs(images(4.0, (-1.0, -0.5)) - unguided).max() <= 1
        assert np.abs(images(4.0, (0.0, 1.1)) - guided).max() <= 1
        part = images(4.0, (0.5, 1.1))
        assert (part != guided).any()
        assert (part != unguided).any()


def test_less_guidance_than_none_is_no_guidance_in_diffusers_own_pipelines() -> None:
    """Training extrapolates with any scale, and so do our pipelines; diffusers' would take 0.5 for 1."""
    arguments = {"seeds": [5], "steps": 2, "batch_size": 1}
    half, whole = (sample_images(dit_pipeline(), ["1"], guidance=scale, **arguments) for scale in (0.5, 1.0))
    assert (half != whole).any()
    with pytest.raises(
        UserError,
        match=r"StableDiffusion3Pipeline guides at scales above 1 alone and would take --guidance 0.5",
    ):
        sample_images(make_pipeline(), ["a cat"], guidance=0.5, **arguments)
