"""How the tokens of an image and its text are spread over the ranks that hold one replica of the model.

Each stream is scattered by itself, over context-parallel ranks first and then, with sequence parallelism, over
tensor-parallel ranks: a rank holds ``[L_pad / (CP TP) + S / (CP TP), B, H]``, text first, so that blocks split the two
at a fixed place. Text is padded to a multiple of the ranks; the padding never enters attention as a key or value.

Whatever acts on scattered tokens with weights that every rank holds has gradients that are sums over the ranks.
Megatron-Core takes the sum over tensor-parallel ranks for parameters that :func:`mark_partial` marks (after the
backward pass, in finalize_model_grads) and over context-parallel ranks together with the data-parallel ones.
"""

import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


def num_shards(config: TransformerConfig) -> int:
    """Return over how many ranks a sequence is scattered."""
    sequence_parallel = config.tensor_model_parallel_size if config.sequence_parallel else 1
    return config.context_parallel_size * sequence_parallel


def shard_index(config: TransformerConfig) -> int:
    """Return which part of a scattered sequence this rank holds."""
    context = parallel_state.get_context_parallel_rank()
    if not config.sequence_parallel:
        return context
    return context * config.tensor_model_parallel_size + parallel_state.get_tensor_model_parallel_rank()


def padded_length(length: int, shards: int) -> int:
    """Return ``length`` rounded up to a multiple of ``shards``."""
    return -(-length // shards) * shards


def scatter(tokens: Tensor, config: TransformerConfig) -> Tensor:
    """Keep this rank's part [L_pad / (CP TP), B, H] of a stream [L, B, H] that every rank holds."""
    shards = num_shards(config)
    missing = padded_length(tokens.shape[0], shards) - tokens.shape[0]
    padded = F.pad(tokens, (0, 0, 0, 0, 0, missing)) if missing else tokens
    return padded.chunk(shards)[shard_index(config)]


def scatter_context(table: Tensor, config: TransformerConfig) -> Tensor:
    """Keep the rows [L_pad / CP, ...] of a table [L, ...] that belong to the heads' tokens of this rank; padding is zero."""
    missing = padded_length(len(table), num_shards(config)) - len(table)
    padded = F.pad(table, (0, 0, 0, missing)) if missing else table
    return padded.chunk(config.context_parallel_size)[parallel_state.get_context_parallel_rank()]


def gather(tokens: Tensor, config: TransformerConfig) -> Tensor:
    """Put a stream together, [S / (CP TP), B, H] to [S, B, H]; what follows is the same on every rank."""
    groups = []
    if config.sequence_parallel:
        groups.append(parallel_state.get_tensor_model_parallel_group())
    if config.context_parallel_size > 1:
        groups.append(parallel_state.get_context_parallel_group())
    for group in groups:
        tokens = gather_from_sequence_parallel_region(tokens, tensor_parallel_output_grad=False, group=group)
    return tokens


def gather_context(tokens: Tensor, config: TransformerConfig) -> Tensor:
    """Gather keys or values [S / CP, B, heads / TP, head_dim] over context-parallel ranks, for queries of this rank."""
    if config.context_parallel_size == 1:
        return tokens
    return gather_from_sequence_parallel_region(tokens, group=parallel_state.get_context_parallel_group())


def sequence_to_heads(projected: Tensor) -> Tensor:
    """Exchange [S / TP, B, 3 H], with q, k and v side by side, for this rank's heads [S, B, 3 H / TP]."""
    group = parallel_state.get_tensor_model_parallel_group()
    ranks = group.size()
    if ranks == 1:
        return projected
    by_rank = projected.unflatten(-1, (3, ranks, -1)).movedim(-2, 0)  # [TP, S / TP, B, 3, H / TP]
    return all_to_all(group, by_rank.flatten(3).flatten(0, 1).contiguous())


def mark_partial(module: nn.Module, config: TransformerConfig) -> None:
    """Have the gradients of a module that every tensor-parallel rank holds whole added up over these ranks."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
