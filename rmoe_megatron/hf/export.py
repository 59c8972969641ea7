"""From a training checkpoint to a diffusers folder."""

import shutil
from dataclasses import replace
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler

from rmoe_megatron import durable
from rmoe_megatron.checkpoint.folders import find_checkpoint
from rmoe_megatron.checkpoint.state import load_weights
from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.schema import Device, ParallelConfig, Precision, RunConfig
from rmoe_megatron.config.validation import check_writable
from rmoe_megatron.encoders.autoencoder import load_autoencoder
from rmoe_megatron.encoders.text import load_text_encoder
from rmoe_megatron.errors import UserError
from rmoe_megatron.hf.mapping import to_diffusers, transformer_arguments
from rmoe_megatron.hf.pipeline import RecurrentSD3Pipeline
from rmoe_megatron.hf.transformer import RecurrentSD3Transformer2DModel
from rmoe_megatron.model.mmdit import MMDiT
from rmoe_megatron.parallel import process_groups


def export_run(run_dir: Path, out: Path, step: int | None, averaged: bool) -> None:
    """Write the weights of a run in float32 as a diffusers folder, which appears whole or not at all.

    Args:
        step: checkpoint to export; None takes the newest complete one.
        averaged: the moving averages instead of the weights of the step.

    Raises:
        UserError: the run has no complete checkpoint, or ``out`` is not empty or cannot be written.
    """
    if not run_dir.is_dir():
        raise UserError(f"There is no run at {run_dir}; give the run_dir of an earlier `rmoe train`.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; choose another one or remove it first.")
    check_writable(out, "The output")
    checkpoint = find_checkpoint(run_dir, step)
    saved = load_config(checkpoint.path / "config.yaml", [])
    config = replace(saved, precision=Precision.fp32, device=Device.cpu, parallel=ParallelConfig())
    with process_groups(config):
        model = MMDiT(config)
        load_weights(model, checkpoint, averaged)
        pipeline = build_pipeline(config, diffusers_transformer(config, model))
    building = out.with_name(f".{out.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    pipeline.save_pretrained(building)
    durable.publish(building, out)


def diffusers_transformer(config: RunConfig, model: MMDiT) -> RecurrentSD3Transformer2DModel:
    """Return the diffusers model with the weights of an unsharded Megatron-Core model."""
    transformer = RecurrentSD3Transformer2DModel(**transformer_arguments(config.model, config.recurrence))
    transformer.load_state_dict(to_diffusers(model.state_dict(), config.model.num_attention_heads))
    return transformer.eval()


def build_pipeline(config: RunConfig, transformer: RecurrentSD3Transformer2DModel) -> RecurrentSD3Pipeline:
    """Put the transformer together with the frozen encoders and the sampler of a run."""
    device = transformer.device
    encoder = load_text_encoder(config.encoders.text_encoder, config.model.text_length, device)
    return RecurrentSD3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=config.diffusion.shift),
        vae=load_autoencoder(config.encoders.autoencoder, device),
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
        text_length=config.model.text_length,
        prediction=config.diffusion.prediction.value,
    )
