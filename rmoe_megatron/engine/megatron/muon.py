"""Muon for the matrices of blocks, by Megatron-Core's emerging optimizers: which parameters it moves, and how far.

For a matrix ``w`` [O, I] with gradient ``g``, learning rate ``r`` and weight decay ``d``, all in float32::

    b <- m b + (1 - m) g                                    m: optimizer.muon_momentum
    n  = m b + (1 - m) g                                    Nesterov's look ahead
    w <- (1 - r d) w - 0.2 sqrt(max(O, I)) r orthogonal(n)

``orthogonal(n)`` brings all singular values of ``n`` near to 1 by five steps of Newton-Schulz, with the coefficients that Megatron-Core
calls quintic. Its entries have a root mean square of 1 / sqrt(max(O, I)), so an update's is 0.2 of the learning rate, as an update of AdamW
has it in practice (arXiv 2502.16982): learning rate and weight decay of AdamW can be kept.
"""

from collections.abc import Iterable
from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon
from torch import Tensor
from torch.optim import Optimizer

from rmoe_megatron.config.run import Precision, RunConfig

# The root mean square of an update is this share of the learning rate.
UPDATE_SIZE = 0.2


def is_moved_by_muon(parameter: Tensor, name: str) -> bool:
    """Return whether Muon moves a parameter: every matrix of a block but the gate's.

    AdamW moves the rest: embeddings, the final layer, vectors, biases, gates, and the modules of the recurrence, which are stacks of
    matrices in one tensor.
    """
    return "transformer.layers." in name and ".recurrence.gate." not in name and parameter.dim() == 2


def muon_settings(config: RunConfig) -> dict[str, Any]:
    """Return what Megatron-Core's ``OptimizerConfig`` has for Muon.

    Newton-Schulz multiplies in the precision of the run, so a run in float32 is exact and one in bf16 is fast.
    """
    return {
        "muon_momentum": config.optimizer.muon_momentum,
        "muon_nesterov": True,
        "muon_scale_mode": "spectral",
        "muon_extra_scale_factor": UPDATE_SIZE,
        "muon_fp32_matmul_prec": "highest" if config.precision is Precision.fp32 else "medium",
        # A matrix that is spread over tensor-parallel ranks is gathered, and every one of them orthogonalizes the whole.
        "muon_tp_mode": "duplicated" if config.parallel.tensor_model_parallel_size > 1 else "blockwise",
    }


def mark_parameters(named: Iterable[tuple[str, Tensor]], head_dim: int) -> None:
    """Mark parameters as Megatron-Core reads it: what AdamW moves, and which matrices are three.

    The rows of a projection to queries, keys and values are those of head after head, and each of the three is orthogonalized alone.
    """
    for name, parameter in named:
        if not is_moved_by_muon(parameter, name):
            parameter.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]
        elif ".linear_qkv" in name:
            parameter.is_qkv, parameter.qkv_split_shapes = True, [head_dim] * 3  # type: ignore[attr-defined]


def mark_main_weights(part: MegatronOptimizer) -> None:
    """Mark the float32 copies of bf16 matrices that are three: Megatron-Core 0.19.2 would orthogonalize them as one."""
    for rounded, mains in zip(
        getattr(part, "float16_groups", []), getattr(part, "fp32_from_float16_groups", []), strict=True
    ):
        for parameter, main in zip(rounded, mains, strict=True):
            if getattr(parameter, "is_qkv", False):
                main.is_qkv, main.qkv_split_shapes = True, parameter.qkv_split_shapes


def is_muon(optimizer: Optimizer) -> bool:
    """Return whether this is Muon, not AdamW."""
    return isinstance(optimizer, TensorParallelMuon)
