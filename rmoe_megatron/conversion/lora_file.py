"""The LoRA of a run as a file of its own, in the layout of PEFT that diffusers loads: beside the base's weights, not merged into them."""

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.conversion.model_card import lora_card
from rmoe_megatron.conversion.origin import PAGE, origin_of
from rmoe_megatron.conversion.weight_names import QueryKeyValueRule, weight_rules
from rmoe_megatron.conversion.weight_record import weight_record
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.pretrained.finite import require_finite
from rmoe_megatron.pretrained.model_files import LORA_WEIGHTS

COMPONENT = "transformer"  # of a pipeline, which the file is for


def export_lora(
    run_dir: Path,
    out: Path,
    step: int | None = None,
    averaged: bool = True,
    dtype: torch.dtype | None = None,
    base: Path | None = None,
) -> Path:
    """Write the LoRA of a run as ``pytorch_lora_weights.safetensors`` into the new folder ``out``, with a page that says what it is.

    ``lora_A`` [r, H] and ``lora_B`` [H, r] are given for query, key and value of every adapted block, alpha being the rank: the update of a
    projection is ``lora_B lora_A``. ``pipeline.load_lora_weights(out)`` of the base's export, with the package peft, gives the outputs of
    the merged export.

    Args:
        step: checkpoint to export; None takes the newest complete one.
        averaged: the moving averages instead of the weights of the step.
        dtype: the data type of the exported weights; None keeps that of the checkpoint.
        base: where the frozen base lies if not where the run's configuration says.

    Returns:
        The file.

    Raises:
        UserError: the run has no complete checkpoint, no LoRA, or one of a model whose pipeline loads none; a weight is not finite in
            ``dtype``; or ``out`` is not empty or cannot be written.
    """
    atomic.require_empty(out, "The output")
    weights = RunWeights(run_dir, step, averaged, base)
    if weights.config.lora is None:
        raise UserError(f"{run_dir} has no LoRA; `rmoe convert to-hf {run_dir}` exports its whole model.")
    if weights.config.model.is_class_conditional:
        raise UserError(
            f"{run_dir} is a DiT, whose pipeline in diffusers loads no LoRA; `rmoe convert to-hf {run_dir}` merges it."
        )
    tensors: dict[str, Tensor] = {}
    for layer in weights.config.lora.layers:
        tensors |= _of_block(weights, layer, weights.config.lora.rank)
    tensors = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        require_finite(
            [(name, tensor)], str(weights.checkpoint.path), kind, "choose another --dtype or --step"
        )
    with atomic.building(out) as partial:
        (partial / LORA_WEIGHTS).write_bytes(save(tensors, weight_record(weights, averaged)))
        exported = next(iter(tensors.values())).dtype
        (partial / PAGE).write_text(lora_card(weights, averaged, exported, origin_of(weights, base), partial))
    return out / LORA_WEIGHTS


def _of_block(weights: RunWeights, layer: int, rank: int) -> dict[str, Tensor]:
    """Return the factors of a block's three projections under PEFT's names."""
    prefix = f"transformer.layers.{layer}."
    projection = f"{prefix}attention.linear_qkv.weight"
    rule = weight_rules([projection], weights.config.model)[projection]
    assert isinstance(rule, QueryKeyValueRule)
    down = weights.locations[f"{prefix}lora.down"].read()
    up = weights.locations[f"{prefix}lora.up"].read()
    factors: dict[str, Tensor] = {}
    for name, lora_a, lora_b in zip(rule.names, down.view(3, rank, -1), up, strict=True):
        module = f"{COMPONENT}.{name.removesuffix('.weight')}"
        factors |= {f"{module}.lora_A.weight": lora_a, f"{module}.lora_B.weight": lora_b}
    return factors
