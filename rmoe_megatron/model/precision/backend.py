"""Whose kernels do the work: what a run asks for, what is installed here, and one line that says so.

Nothing heavy is imported: these checks also take place where a job is submitted.
"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from rmoe_megatron.config.run import Backend, Fp8Recipe, Precision, RunConfig
from rmoe_megatron.config.stages import stages_of
from rmoe_megatron.distributed.device import PARAMS_DTYPE, runs_on_cuda
from rmoe_megatron.distributed.processor import (
    bf16_instructions,
    bf16_is_fast,
    describe_bf16,
    product_seconds,
)
from rmoe_megatron.errors import UserError
from rmoe_megatron.model.softmax_attention import Way, way_to_attend

INSTALL = "pip install 'rmoe-megatron[gpu]'"


def is_installed(package: str, part: str = "") -> bool:
    """Return whether a package, and a part of that name in it, can be imported; imports neither."""
    found = find_spec(package)
    return found is not None and any(
        part == "" or Path(folder, part).is_dir() for folder in found.submodule_search_locations or ()
    )


def resolve_precision(config: RunConfig) -> RunConfig:
    """Return the configuration with the precision that ``auto`` stands for on the device of this run; others stay."""
    if config.precision is not Precision.auto:
        return config
    is_bf16 = runs_on_cuda(config.device) or bf16_is_fast()
    return replace(config, precision=Precision.bf16 if is_bf16 else Precision.fp32)


def warn_of_slow_precision(config: RunConfig) -> str | None:
    """Return a line for a run in bf16 on a processor that multiplies fp32 faster; None where that is not so."""
    if config.precision is Precision.fp32 or runs_on_cuda(config.device) or bf16_is_fast():
        return None
    slower = product_seconds().bf16 / product_seconds().fp32
    why = "does not use its instructions for it" if bf16_instructions() else "has no instructions for it"
    return (
        f"precision={config.precision.value} multiplies in bf16 and this processor {why}: a matrix product takes {slower:.0f} "
        "times as long as in fp32; precision=auto would take fp32."
    )


def uses_transformer_engine(config: RunConfig) -> bool:
    """Return whether blocks are built of Transformer Engine's linear layers."""
    if config.precision.is_emulated or config.backend is Backend.local or not runs_on_cuda(config.device):
        return False
    return config.backend is Backend.transformer_engine or is_installed("transformer_engine")


def warn_of_new_histories(config: RunConfig, step: int) -> str | None:
    """Return a line for a run that goes on after ``step`` steps with scales from a past that its checkpoint does not hold; else None."""
    is_delayed = config.precision is Precision.fp8 and config.fp8.recipe is Fp8Recipe.delayed
    if step == 0 or not is_delayed:
        return None
    return (
        f"fp8.recipe=delayed takes its scales from the largest values of the steps before, and a checkpoint does not hold what "
        f"Transformer Engine remembers of them, so it begins anew after step {step}: the next losses differ a little from those of "
        "a run without a break. fp8.recipe=tensorwise has no past to lose."
    )


def fits_grouped_mm(hidden_size: int, rank: int | None, bytes_each: int) -> bool:
    """Return whether rows of the modules' factors start at multiples of 16 bytes, as ``torch.nn.functional.grouped_mm`` needs."""
    widths = [hidden_size] if rank is None else [hidden_size, rank]
    return all(width * bytes_each % 16 == 0 for width in widths)


def check_backend(config: RunConfig) -> None:
    """Check that what backend and precision ask for is here.

    Raises:
        UserError: there is no GPU, or Transformer Engine is not installed.
    """
    if config.training.compile and uses_transformer_engine(config):
        raise UserError(
            "training.compile=true is for Megatron-Core's layers, not Transformer Engine's; set backend=local."
        )
    if config.precision is Precision.fp8:
        wanted, remedy = "precision=fp8", "set precision=fp8_emulated to try it in ordinary arithmetic"
    elif config.backend is Backend.transformer_engine:
        wanted, remedy = "backend=transformer_engine", "set backend=auto"
    else:
        return
    if not runs_on_cuda(config.device):
        raise UserError(f"{wanted} needs a GPU, and this run has none; {remedy}.")
    if not is_installed("transformer_engine"):
        raise UserError(f"{wanted} needs Transformer Engine, which is not installed: {INSTALL}, or {remedy}.")


def describe_backend(config: RunConfig, engine: str = "") -> str:
    """Return one sentence: on what and in which precision a run computes, and with whose layers.

    Args:
        engine: the libraries of the engine besides Megatron-Core, as " and DeepSpeed".
    """
    where = "a GPU" if runs_on_cuda(config.device) else "the CPU"
    layers = "Transformer Engine" if uses_transformer_engine(config) else "Megatron-Core"
    return (
        f"The run computes in {config.precision.value} on {where} with the layers of {layers}{engine}; --verbose says which kernels "
        "are used and why."
    )


def describe_kernels(config: RunConfig, adam: str) -> str:
    """Return one line: which layers are whose, what is fused, and why the rest is not.

    Args:
        adam: whose Adam the engine takes, in its own words.
    """
    cuda = runs_on_cuda(config.device)
    if config.precision.is_emulated:
        linear = f"Megatron-Core's, rounded as {_recipe(config)} (emulated)"
    elif uses_transformer_engine(config):
        linear = "Transformer Engine's" + (
            f" in {_recipe(config)}" if config.precision is Precision.fp8 else ""
        )
    else:
        linear = f"Megatron-Core's ({_why_local(config, cuda)})"
    modules = ""
    if config.recurrence is not None:
        hidden, rank = config.model.hidden_size, config.recurrence.rank
        rounded = config.precision.is_emulated and config.fp8.recipe is not Fp8Recipe.delayed
        fits = fits_grouped_mm(hidden, rank, config.precision.parameter_bytes) and not rounded
        why = f"grouped_mm needs multiples of 16 bytes, not H={hidden}, rank={rank}"
        if rounded or not cuda:
            why = "rounded each by itself" if rounded else "faster than grouped_mm on a CPU"
        products = "grouped_mm" if cuda and fits else f"batched ({why})"
        modules = f", modules {products} in all-to-all dispatch (DeepEP is not used: modules return 3 H)"
    precision = config.precision.value if cuda else f"{config.precision.value} ({describe_bf16()})"
    compiled = "compiled" if config.training.compile else "not compiled (training.compile)"
    return (
        f"precision {precision}; layers: linear {linear}, attention {_attention(config, cuda)}, norms PyTorch's without weights, "
        f"Adam fused ({adam}){modules}, blocks {compiled}."
    )


def _attention(config: RunConfig, cuda: bool) -> str:
    """Say how attention is computed at the sizes of this run; see :mod:`rmoe_megatron.model.softmax_attention`."""
    model, parallel, dtype = config.model, config.parallel, PARAMS_DTYPE[config.precision]
    device, ranks = (
        torch.device("cuda" if cuda else "cpu"),
        parallel.tensor_model_parallel_size * parallel.context_parallel_size,
    )
    ways = set()
    for stage in stages_of(config):
        tokens = model.text_length + (stage.sample_size // model.patch_size) ** 2
        rows = stage.micro_batch_size * model.num_attention_heads * tokens // ranks
        ways.add(way_to_attend(device, dtype, rows, tokens, dtype is torch.bfloat16 and bf16_is_fast()))
    names = {
        Way.fused: "fused (PyTorch's scaled_dot_product_attention)",
        Way.products: "by batched products (the faster way here; scores are kept)",
    }
    return " or ".join(names[way] for way in Way if way in ways)


def _recipe(config: RunConfig) -> str:
    return "NVFP4" if config.precision is Precision.nvfp4_emulated else f"FP8 {config.fp8.recipe.value}"


def _why_local(config: RunConfig, cuda: bool) -> str:
    if config.backend is Backend.local:
        return "backend=local"
    if not cuda:
        return "Transformer Engine needs a GPU"
    return f"Transformer Engine is not installed: {INSTALL}"
