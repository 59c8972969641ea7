"""Checkpoints of the original DiT: imported, exported and run as the original's own equations say."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import DiTTransformer2DModel

from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.config.model import DiffusionConfig, Objective, Prediction
from rmoe_megatron.config.run import ParallelConfig
from rmoe_megatron.conversion.export import export_run, exported_config
from rmoe_megatron.conversion.facebook_dit import FacebookDiT
from rmoe_megatron.errors import UserError
from rmoe_megatron.hf import RecurrentDiTTransformer2DModel
from tests.support.configurations import RECURRENCE, one_rank, randomise
from tests.support.original_dit import OriginalDiT

CLASSES = 7


def make_original() -> OriginalDiT:
    """Random weights; latents of 4 channels and 8 x 8."""
    model = OriginalDiT(side=8, patch=2, channels=4, hidden_size=32, depth=3, heads=2, classes=CLASSES)
    fixed = model.pos_embed.clone()
    randomise(model)
    model.pos_embed.data.copy_(fixed)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run`` imported from a file as the original's training writes it, and ``exported`` from it."""
    from rmoe_megatron.conversion.importing import import_facebook_dit

    folder = tmp_path_factory.mktemp("original")
    state = make_original().state_dict()
    torch.save({"model": state, "ema": state, "opt": {}, "args": None}, folder / "dit.pt")
    import_facebook_dit(folder / "dit.pt", folder / "run", 2, ParallelConfig())
    assert export_run(folder / "run", folder / "exported") == {}
    return folder


def inputs(timestep: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(timestep)
    labels = torch.tensor([3, CLASSES])  # a class and the dropped label
    return torch.randn(2, 4, 8, 8, generator=generator), torch.full((2,), float(timestep)), labels


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("timestep", [0, 1, 500, 999])
def test_outputs_equal_the_originals_equations(timestep: int, folder: Path) -> None:
    from rmoe_megatron.checkpoint.model_state import load_weights
    from rmoe_megatron.model.build import build_transformer

    latents, times, labels = inputs(timestep)
    exported = RecurrentDiTTransformer2DModel.from_pretrained(folder / "exported" / "transformer").eval()
    weights = RunWeights(folder / "run")
    assert weights.config.model.mlp_norm_eps == exported.config.norm_eps == 1e-6
    with one_rank(weights.config), torch.no_grad():
        expected = make_original()(latents, times, labels)
        model = build_transformer(weights.config, initialise=False)
        load_weights(torch.nn.ModuleList([model]), weights, fresh=lambda name: False)
        assert error(model.eval()(latents, times, torch.arange(2), labels), expected) < 1e-5
        assert error(exported(latents, times, labels).sample, expected) < 1e-5


def test_an_exported_original_is_imported_as_it_was(folder: Path, tmp_path: Path) -> None:
    from rmoe_megatron.conversion.importing import import_diffusers

    import_diffusers(folder / "exported", tmp_path / "again", 0, ParallelConfig())
    first, again = RunWeights(folder / "run"), RunWeights(tmp_path / "again")
    assert again.config.model == first.config.model
    assert again.fingerprint() == first.fingerprint()


def test_diffusers_class_is_an_approximation_that_is_asked_for_and_measured(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="cannot express model.downscale_freq_shift=0.*--approximate"):
        export_run(folder / "run", tmp_path / "model", transformer_class="diffusers")
    measured = export_run(folder / "run", tmp_path / "model", transformer_class="diffusers", approximate=True)
    stock = DiTTransformer2DModel.from_pretrained(tmp_path / "model" / "transformer").eval()
    assert measured.keys() == {0, 250, 500, 750, 999}
    assert measured[0] < 1e-5 < 0.05 < measured[999]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 4, 8, 8, generator=generator)
    labels = torch.randint(CLASSES, (4,), generator=generator)
    for timestep, value in measured.items():
        times = torch.full((4,), float(timestep))
        with torch.no_grad():
            expected = make_original()(latents, times, labels)
            assert error(stock(latents, times, labels).sample, expected) == pytest.approx(value, abs=1e-5)


def test_what_cannot_be_approximated_is_refused(folder: Path) -> None:
    config = RunWeights(folder / "run").config
    recurrent = replace(config, recurrence=RECURRENCE)
    with pytest.raises(UserError, match="cannot express recurrence of this model; leave") as refused:
        exported_config(recurrent, "diffusers", approximate=True)
    assert "--approximate" not in str(refused.value)
    sample = replace(config, diffusion=DiffusionConfig(prediction=Prediction.sample))
    with pytest.raises(UserError, match="diffusion.prediction=sample and model.downscale_freq_shift=0"):
        exported_config(sample, "diffusers", approximate=False)
    with pytest.raises(UserError, match="--approximate is for --transformer diffusers; auto"):
        exported_config(config, "auto", approximate=True)
    with pytest.raises(UserError, match="--transformer stock must be auto, diffusers, rmoe"):
        exported_config(config, "stock", approximate=False)


def test_our_class_can_be_asked_for(folder: Path, tmp_path: Path) -> None:
    """A model that diffusers' own class can express, in ours: the same outputs."""
    from rmoe_megatron.conversion.importing import import_diffusers

    export_run(folder / "run", tmp_path / "stock", transformer_class="diffusers", approximate=True)
    import_diffusers(tmp_path / "stock", tmp_path / "run", 0, ParallelConfig())
    export_run(tmp_path / "run", tmp_path / "own", transformer_class="rmoe")
    stock = DiTTransformer2DModel.from_pretrained(tmp_path / "stock" / "transformer").eval()
    own = RecurrentDiTTransformer2DModel.from_pretrained(tmp_path / "own" / "transformer").eval()
    assert '"RecurrentDiTTransformer2DModel"' in (tmp_path / "own" / "model_index.json").read_text()
    with torch.no_grad():
        assert torch.equal(own(*inputs(999)).sample, stock(*inputs(999)).sample)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", ""])
def test_what_wrappers_put_before_all_names_is_left_out(prefix: str, folder: Path, tmp_path: Path) -> None:
    """DDP's, torch.compile's, and those of both; with what the original's training writes beside the weights."""
    state = {f"{prefix}{name}": value for name, value in make_original().state_dict().items()}
    arguments = argparse.Namespace(model="DiT-S/8", image_size=256, results_dir=None)
    optimizer = {"state": {}, "param_groups": [{"lr": 1e-4}]}
    for content in (
        state,
        {"model": {}, "ema": state, "opt": optimizer, "args": arguments},
        {"state_dict": state},
    ):
        torch.save(content, tmp_path / "dit.pt")
        source = FacebookDiT(tmp_path / "dit.pt", 2)
        expected = FacebookDiT(folder / "dit.pt", 2)
        assert source.shapes == expected.shapes
        assert all(torch.equal(source.read(name), expected.read(name)) for name in expected.shapes)
    safetensors.torch.save_file(state, tmp_path / "dit.safetensors")
    assert FacebookDiT(tmp_path / "dit.safetensors", 2).shapes == expected.shapes


def test_a_prefix_of_some_names_is_no_wrapper_s(tmp_path: Path) -> None:
    state = make_original().state_dict()
    state["module.final_layer.linear.bias"] = state.pop("final_layer.linear.bias")
    torch.save(state, tmp_path / "dit.pt")
    with pytest.raises(UserError, match="missing final_layer.linear.bias"):
        FacebookDiT(tmp_path / "dit.pt", 2)


def test_arguments_that_are_no_data_are_not_read(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "executed"),)

    state = make_original().state_dict()
    torch.save({"ema": state, "args": argparse.Namespace(path=Touch())}, tmp_path / "dit.pt")
    with pytest.raises(UserError, match="cannot be read as a file of plain tensors"):
        FacebookDiT(tmp_path / "dit.pt", 2)
    assert not (tmp_path / "executed").exists()


@pytest.fixture(scope="module")
def sit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run`` imported from a file of SiT, and ``exported`` from it."""
    from rmoe_megatron.conversion.importing import import_facebook_dit

    folder = tmp_path_factory.mktemp("sit")
    arguments = argparse.Namespace(path_type="Linear", prediction="velocity", loss_weight=None)
    torch.save({"ema": make_original().state_dict(), "args": arguments}, folder / "weights.pt")
    objective = Objective.rectified_flow
    import_facebook_dit(folder / "weights.pt", folder / "run", 2, ParallelConfig(), objective=objective)
    export_run(folder / "run", folder / "exported")
    return folder


@pytest.mark.parametrize("timestep", [0, 1, 250, 999, 1000])
def test_sit_is_a_rectified_flow(timestep: int, sit: Path) -> None:
    """At t = 1 - timestep / 1000 the velocity is SiT's with the other sign: the first half of its channels."""
    from rmoe_megatron.checkpoint.model_state import load_weights
    from rmoe_megatron.model.build import build_transformer

    latents, times, labels = inputs(timestep)
    exported = RecurrentDiTTransformer2DModel.from_pretrained(sit / "exported" / "transformer").eval()
    weights = RunWeights(sit / "run")
    assert weights.config.diffusion.objective is Objective.rectified_flow
    with one_rank(weights.config), torch.no_grad():
        expected = -make_original()(latents, 1 - times / 1000, labels)[:, :4]
        model = build_transformer(weights.config, initialise=False)
        load_weights(torch.nn.ModuleList([model]), weights, fresh=lambda name: False)
        assert error(model.eval()(latents, times, torch.arange(2), labels), expected) < 1e-5
        assert error(exported(latents, times, labels).sample, expected) < 1e-5


def test_an_exported_sit_draws(sit: Path, tmp_path: Path) -> None:
    """Euler's steps from noise, as SiT's own equation dx = v dt has them."""
    from rmoe_megatron.inference.sampling import load_pipeline

    pipeline = load_pipeline(sit / "exported")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = pipeline(
        [3], num_inference_steps=5, guidance_scale=1.0, latents=noise, output_type="latent"
    ).images
    latents, original = noise.clone(), make_original()
    times = [1 - float(sigma) for sigma in pipeline.scheduler.sigmas]
    with torch.no_grad():
        for now, after in zip(times[:-1], times[1:], strict=True):
            velocity = original(latents, torch.tensor([now]), torch.tensor([3]))[:, :4]
            latents = latents + (after - now) * velocity
    assert error(drawn, latents) < 1e-4


def test_a_file_of_sit_is_not_taken_for_a_dit(folder: Path, tmp_path: Path) -> None:
    from rmoe_megatron.conversion.importing import import_facebook_dit

    state = make_original().state_dict()
    flow = argparse.Namespace(path_type="Linear", prediction="velocity")
    for name, content in {"SiT-XL-2-256x256.pt": state, "last.pt": {"ema": state, "args": flow}}.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match="seems to be of SiT.*--objective rectified_flow"):
            import_facebook_dit(tmp_path / name, tmp_path / "run", 2, ParallelConfig())
    for name, value in {"path_type": "GVP", "prediction": "score"}.items():
        other = argparse.Namespace(**vars(flow) | {name: value})
        torch.save({"ema": state, "args": other}, tmp_path / "other.pt")
        with pytest.raises(UserError, match=f'was trained with {name}="{value}"'):
            import_facebook_dit(
                tmp_path / "other.pt",
                tmp_path / "run",
                2,
                ParallelConfig(),
                objective=Objective.rectified_flow,
            )
    torch.save(state, tmp_path / "transition.pt")  # no SiT in it
    import_facebook_dit(tmp_path / "transition.pt", tmp_path / "run", 2, ParallelConfig())
