"""From a run to one file in the layout that its model was published in, which programs other than diffusers read (ComfyUI among them)."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors.torch import save_file
from torch import Tensor

from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.config.model import Architecture, ModelConfig
from rmoe_megatron.conversion.export import DiffusersWeights, at_stage_of
from rmoe_megatron.conversion.facebook_dit import dit_layout
from rmoe_megatron.conversion.original_layout import Layout, put_together
from rmoe_megatron.conversion.original_limits import beyond_original
from rmoe_megatron.conversion.sd3_file import HEAD_SIZE, PREFIX, sd3_layout
from rmoe_megatron.conversion.weight_record import weight_record
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"


def export_single_file(
    run_dir: Path,
    file: Path,
    step: int | None = None,
    averaged: bool = True,
    dtype: torch.dtype | None = None,
    base: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the transformer of a run as one safetensors file, which appears whole or not at all; LoRA is merged.

    Stable Diffusion 3 and 3.5 have their published names under ``model.diffusion_model.``, a DiT has those of facebookresearch/DiT. All
    of the file is held in memory. Size of images, sampler and length of the text are nothing that the layout can say.

    Args:
        file: to be made; its name ends in ``.safetensors``.
        step: checkpoint to export; None takes the newest complete one.
        averaged: the moving averages instead of the weights of the step.
        dtype: the data type of the exported weights; None keeps that of the checkpoint, and takes the widest where it has several.
        base: where the frozen base lies if not where the run's configuration says.

    Raises:
        UserError: the run has no complete checkpoint, or a model that the layout has no place for; a weight is not finite in ``dtype``;
            or the file is there, has another suffix, or cannot be written.
    """
    if file.suffix != SUFFIX:
        raise UserError(f"The output {file} must be a {SUFFIX} file.")
    if file.exists():
        raise UserError(f"{file} exists; choose another name or remove it first.")
    atomic.check_writable(file.parent, "The output")
    weights = RunWeights(run_dir, step, averaged, base)
    config = at_stage_of(weights.config, weights.checkpoint.step)
    beyond = beyond_original(config)
    if beyond:
        raise UserError(
            f"The original layout has no place for {' and '.join(beyond)} of {run_dir}; `rmoe convert to-hf {run_dir}` exports it."
        )
    is_dit = config.model.architecture is Architecture.dit
    layout = dit_layout(config.model) if is_dit else sd3_layout(config.model)
    reader = DiffusersWeights(weights, dtype)
    if unknown := sorted(reader.sources.keys() - layout.keys()):
        raise UserError(f"The original layout has no place for {unknown[0]} of {weights.checkpoint.path}.")
    tensors = dict(_tensors(layout, reader, "" if is_dit else PREFIX, progress))
    if is_dit:
        tensors["pos_embed"] = _positions(config.model).to(reader.dtype)
    elif config.model.hidden_size != HEAD_SIZE * config.model.num_layers:
        logger.warning(
            "The code that Stable Diffusion 3 was published with, and ComfyUI, take the number of blocks from the width (width / %d): they "
            "will not read %s, whose model has %d blocks of width %d.",
            HEAD_SIZE, file, config.model.num_layers, config.model.hidden_size,
        )  # fmt: skip
    size = sum(tensor.nbytes for tensor in tensors.values())
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic.writing(file, size) as partial:
        save_file(tensors, partial, metadata=weight_record(weights, averaged))


def _tensors(
    layout: Layout, reader: DiffusersWeights, prefix: str, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, Tensor]]:
    total = len({rows.source for rows in layout.values()})
    for done, (name, tensor) in enumerate(put_together(layout, reader.read)):
        yield prefix + name, tensor
        if progress is not None:
            progress(done + 1, total)


def _positions(model: ModelConfig) -> Tensor:
    """Return the fixed positions [1, tokens, H] that the original DiT keeps among its weights, float32."""
    side = model.sample_size // model.patch_size
    embedded = get_2d_sincos_pos_embed(model.hidden_size, side, base_size=side, output_type="pt")
    return embedded.float().unsqueeze(0)
