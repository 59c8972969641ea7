"""The experts of the recurrence: grouped low-rank or full-rank Q/K/V projections."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from rmoe_megatron.config.model import RecurrenceConfig
from rmoe_megatron.model.precision.backend import fits_grouped_mm


def grouped_product(tokens: Tensor, weight: Tensor) -> Tensor:
    """Return ``x w^T`` [G, N, O] of tokens [G, N, K] and weights [G, O, K], group by group."""
    return tokens.bmm(weight.transpose(1, 2))


class _Gather(torch.autograd.Function):
    """Rows at places that are all different; PyTorch's own backward pass adds rows up one by one, in case some are the same."""

    @staticmethod
    def forward(context: Any, rows: Tensor, places: Tensor) -> Tensor:
        context.save_for_backward(places)
        context.num_rows = len(rows)
        return rows.index_select(0, places)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (places,) = context.saved_tensors
        whole = gradients[0].new_zeros(context.num_rows, *gradients[0].shape[1:])
        return whole.index_copy_(0, places, gradients[0]), None


class Packing:
    """Puts tokens into a dense [M, capacity, ...] block, each into the rows of its expert, and back; gaps are zero.

    The host has to know the numbers of tokens, as it does already where the all-to-all dispatch needed them. The
    capacity is the longest group rounded up to a multiple of ``GRANULARITY``: CPU matrix products are compiled for
    their shape, and unrounded group sizes would compile new ones in every step.

    Args:
        tokens_per_expert: int64 [M].
    """

    GRANULARITY = 32

    def __init__(self, tokens_per_expert: Tensor) -> None:
        granules = -(-int(tokens_per_expert.max()) // self.GRANULARITY)
        self.shape = (tokens_per_expert.numel(), max(granules, 1) * self.GRANULARITY)
        self.first_rows = torch.arange(self.shape[0], device=tokens_per_expert.device) * self.shape[1]

    def rows_of_sorted(self, tokens_per_expert: Tensor, num_tokens: int, device: torch.device) -> Tensor:
        """Return the row of every token where tokens are sorted by expert, int64 [N]."""
        ends = tokens_per_expert.cumsum(0)
        tokens = torch.arange(num_tokens, device=ends.device)
        experts = torch.searchsorted(ends, tokens, right=True)
        rows = tokens + (self.first_rows - ends + tokens_per_expert)[experts]
        return rows.to(device, non_blocking=True)

    def rows_of(self, routing_map: Tensor) -> Tensor:
        """Return the row of every token, int64 [N], from the expert that each goes to, bool [N, M]."""
        number = routing_map.cumsum(0) - 1
        return torch.where(routing_map, number + self.first_rows, 0).sum(dim=1)

    def pack(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """[N, ...] to [M, capacity, ...]."""
        packed = tokens.new_zeros(self.shape[0] * self.shape[1], *tokens.shape[1:])
        return packed.index_copy(0, rows, tokens).unflatten(0, self.shape)

    def unpack(self, packed: Tensor, rows: Tensor) -> Tensor:
        """[M, capacity, ...] to [N, ...]."""
        return _Gather.apply(packed.flatten(0, 1), rows)


class Experts(MegatronModule):
    """The experts that live on this expert-parallel rank: M / EP of them, contiguous.

    Low rank (``B_m A_m`` for each of Q, K and V): ``down`` [M, 3 r, H] with rows of q, k and v, ``up`` [M, 3, H, r].
    Full rank: ``weight`` [M, 3 H, H] with rows of q, k and v. ``down`` starts Kaiming-uniform and ``up`` normal
    with ``up_init_std`` (0: a fresh expert leaves its base model unchanged); ``weight`` starts like ``up``.
    """

    def __init__(
        self, config: TransformerConfig, recurrence: RecurrenceConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        self.ep_group = pg_collection.ep
        self.expert_data_parallel_group = pg_collection.expt_dp
        self.num_local_experts = recurrence.num_modules // self.ep_group.size()
        experts, hidden, rank = recurrence.num_modules, config.hidden_size, recurrence.rank
        if rank is None:
            self.weight = self._parameter(self._normal((experts, 3 * hidden, hidden), recurrence.up_init_std))
        else:
            down = torch.empty(experts, 3 * rank, hidden).uniform_(-1, 1).mul_(1 / math.sqrt(hidden))
            self.down = self._parameter(down)
            self.up = self._parameter(self._normal((experts, 3, hidden, rank), recurrence.up_init_std))
        self.rank = rank
        self._product: Callable[[Tensor, Tensor], Tensor] = grouped_product
        # Otherwise experts run as batched products, and the run says so when it starts.
        self.fits_grouped_mm = fits_grouped_mm(hidden, rank, config.params_dtype.itemsize)

    def multiply_with(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Take ``product`` instead of :func:`grouped_product` on every device; a group's tokens end in rows of zeros."""
        self._product, self.fits_grouped_mm = product, False

    @staticmethod
    def _normal(shape: tuple[int, ...], std: float) -> Tensor:
        return torch.randn(shape).mul_(std)

    def _parameter(self, all_experts: Tensor) -> nn.Parameter:
        """Keep this rank's slice of a tensor that every rank draws whole, so that values don't depend on the layout."""
        mine = all_experts.chunk(self.ep_group.size())[self.ep_group.rank()]
        parameter = nn.Parameter(mine.to(self.config.params_dtype).contiguous())
        # Reduced over expert-data-parallel ranks; with EP=1 too, so that checkpoints have one form for every EP.
        parameter.allreduce = False  # type: ignore[attr-defined]
        # Otherwise Megatron-Core takes it for a replica on all tensor-parallel ranks but the first, and leaves it out
        # of the gradient norm there.
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        return parameter

    def sorts(self, tokens: Tensor) -> bool:
        """Return whether tokens on this device have to come sorted by expert, for grouped matrix products.

        Those run on a CPU too, but take 1.1 to 5 times as long there as batched ones in bf16 (512 to 4,096 tokens, five experts).
        """
        return tokens.is_cuda and self.fits_grouped_mm

    def forward(
        self, tokens: Tensor, tokens_per_expert: Tensor, weights: Tensor, routing_map: Tensor | None = None
    ) -> Tensor:
        """Apply each expert to its tokens.

        Args:
            tokens: [N, H], sorted by expert or with a routing map.
            tokens_per_expert: int64 [M / EP], on the host after an all-to-all, else with the tokens; some may be zero.
            weights: float32 [N], the gate's weight of each token.
            routing_map: bool [N, M], the expert of each token, where all are on this rank and tokens come in any order; not
                where :meth:`sorts` says that they have to be sorted.

        Returns:
            [N, 3 H] in the order of the tokens: q, k and v side by side.
        """
        # Experts are linear: what goes in is weighed, not what comes out, which is three times as wide.
        weighted = tokens * weights.unsqueeze(-1).to(tokens.dtype)
        if self.sorts(tokens):
            return self._project_grouped(weighted, tokens_per_expert)
        if routing_map is not None:
            packing = Packing(tokens_per_expert)
            rows = packing.rows_of(routing_map)
        else:
            tokens_per_expert = tokens_per_expert.to("cpu", torch.int64)
            packing = Packing(tokens_per_expert)
            rows = packing.rows_of_sorted(tokens_per_expert, len(tokens), tokens.device)
        return packing.unpack(self._project_packed(packing.pack(weighted, rows)), rows)

    def _project_grouped(self, tokens: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Project tokens [N, H], sorted by expert, with grouped matrix products; returns [N, 3 H]."""
        offsets = tokens_per_expert.to(tokens.device, non_blocking=True).cumsum(0, dtype=torch.int32)
        if self.rank is None:
            return F.grouped_mm(tokens, self.weight.transpose(1, 2), offs=offsets)
        num_tokens = len(tokens)
        reduced = F.grouped_mm(tokens, self.down.transpose(1, 2), offs=offsets)
        # q, k and v are three times as many groups of one product.
        reduced = reduced.unflatten(-1, (3, self.rank)).transpose(0, 1).flatten(0, 1)
        up = self.up.transpose(0, 1).flatten(0, 1)
        offsets = torch.cat([offsets + part * num_tokens for part in range(3)])
        projected = F.grouped_mm(reduced, up.transpose(1, 2), offs=offsets)
        return projected.unflatten(0, (3, num_tokens)).transpose(0, 1).flatten(1)

    def _project_packed(self, tokens: Tensor) -> Tensor:
        """Project tokens [M, capacity, H] with batched matrix products; returns [M, capacity, 3 H]."""
        if self.rank is None:
            return self._product(tokens, self.weight)
        experts, capacity, _ = tokens.shape
        reduced = self._product(tokens, self.down).view(experts, capacity, 3, self.rank)
        reduced = reduced.transpose(1, 2).reshape(3 * experts, capacity, self.rank)
        projected = self._product(reduced, self.up.flatten(0, 1))
        return projected.view(experts, 3, capacity, -1).transpose(1, 2).flatten(2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Shard the expert dimension over expert-parallel ranks; replicas are the expert-data-parallel ranks."""
        offsets = (*sharded_offsets, (0, self.ep_group.rank(), self.ep_group.size()))
        return _replicated_over(
            self.expert_data_parallel_group.rank(), self.state_dict(keep_vars=True), prefix, offsets
        )


def _replicated_over(
    replica: int, state_dict: dict[str, Tensor], prefix: str, offsets: tuple[Any, ...]
) -> ShardedStateDict:
    """Describe tensors that are sharded by ``offsets`` and held alike by several replicas."""
    from megatron.core.dist_checkpointing import ShardedTensor

    return {
        f"{prefix}{name}": ShardedTensor.from_rank_offsets(
            f"{prefix}{name}", tensor, *offsets, replica_id=(0, 0, replica)
        )
        for name, tensor in state_dict.items()
    }
