"""What a checkpoint holds of a model under ZeRO: every tensor whole, each written by one rank.

ZeRO cuts parameters and optimizer state into flat shards of its own, at stage 3 anew for every number of ranks. A checkpoint
does not: a tensor is put together from its shards, one at a time, and kept by the rank that will write it, in its host's
memory. So beside what it has anyway no rank ever holds more than one whole tensor and its share of the rest, any stage and number of ranks can
go on from it, and weights are found where Megatron-Core's engine writes them.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from torch import Tensor, nn

from rmoe_megatron.checkpoint.model_state import full_state, model_state, without_objects
from rmoe_megatron.engine.deepspeed.expert_groups import is_expert
from rmoe_megatron.engine.deepspeed.optimizer import flat_parameters
from rmoe_megatron.engine.protocol import MainWeight

# Of a parameter, in float32: itself, and Adam's moments under their names in its state.
MASTER = "fp32_param"
MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroState:
    """Takes the state of a model apart and puts it together, one tensor at a time; every rank takes part.

    Args:
        modules: the whole model, before DeepSpeed gets it: at stage 3 its parameters are empty afterwards.
        trained: its trained parameters by name.
        partitions_parameters: whether the stage is 3.
    """

    def __init__(
        self, modules: nn.ModuleList, trained: dict[str, nn.Parameter], partitions_parameters: bool
    ) -> None:
        self.modules, self.trained, self.partitions_parameters = modules, trained, partitions_parameters
        self.state_keys = {name: getattr(entry, "key", name) for name, entry in full_state(modules).items()}
        self.entries = model_state(modules)
        self.shapes = {name: parameter.shape for name, parameter in trained.items()}
        # The ranks that hold the same of a parameter, or its shards.
        dense, spread = (
            parallel_state.get_data_parallel_group(),
            parallel_state.get_expert_data_parallel_group(),
        )
        self.groups = {name: spread if is_expert(parameter) else dense for name, parameter in trained.items()}
        self.writers = self._choose_writers()

    def clear_padding(self, parameters: dict[str, Tensor]) -> None:
        """Zero what fills up the last shards, which DeepSpeed leaves as it found the memory: it may be NaN."""
        from deepspeed.utils import safe_get_local_fp32_param

        for name, part in parameters.items():
            rest = max(0, prod(self.shapes[name]) - self.groups[name].rank() * part.numel())
            part.detach()[rest:].zero_()
            # What lies on the host may be handed out as a copy, so it is set and not changed in place.
            main = safe_get_local_fp32_param(self.trained[name]).clone()
            main[rest:].zero_()
            self._set_optimizer_state(name, MASTER, main)

    def main_weights(self, parameters: dict[str, Tensor]) -> dict[str, MainWeight]:
        """Return what this rank keeps in float32 of the parameters that are not, by their names.

        Args:
            parameters: this rank's parts of the trained parameters.
        """
        from deepspeed.utils import safe_get_local_fp32_param

        found = {}
        for name, part in parameters.items():
            if part.dtype is torch.float32:
                continue
            if self.partitions_parameters:
                found[name] = MainWeight(0, safe_get_local_fp32_param(self.trained[name]).view(-1), None)
                continue
            fragment = getattr(
                self.trained[name], "_hp_mapping", None
            )  # None if nothing of it is in this rank's shard
            start = fragment.lp_fragment_address.start if fragment is not None else 0
            values = fragment.hp_fragment if fragment is not None else torch.empty(0, device=part.device)
            found[name] = MainWeight(start, values, self.groups[name])
        return found

    def describe(
        self, optimizer: Any, parameters: dict[str, Tensor], averages: dict[str, Tensor], is_loading: bool
    ) -> dict[str, Any]:
        """Describe weights, averages and optimizer to Megatron-Core's dist_checkpointing.

        Args:
            optimizer: DeepSpeed's.
            parameters: this rank's parts of the trained parameters; ``averages``: of their averages.
            is_loading: the description names where loaded values go.
        """
        buffers = dict(self.modules.named_buffers())
        model = {
            name: replace(entry, data=buffers[name]) if isinstance(entry, ShardedTensor) else entry
            for name, entry in self.entries.items()
            if name not in self.trained
        }
        if is_loading:
            model = without_objects(model)
        model |= self._describe("", lambda name: self._whole(name, parameters[name]), is_loading, None)
        ema = self._describe(
            "ema.", lambda name: self._whole(name, averages[name]), is_loading, torch.float32
        )
        state: dict[str, Any] = {}
        for kind in (MASTER, *MOMENTS):
            gather = partial(self._optimizer_state, kind)
            state[kind] = self._describe(f"optimizer.{kind}.", gather, is_loading, torch.float32)
        steps = {float(optimizer.optimizer.state[each]["step"]) for each in flat_parameters(optimizer)}
        (step,) = steps
        return {"model": model, "ema": ema, "optimizer": {**state, "step": step}}

    def take(
        self,
        loaded: dict[str, Any],
        optimizer: Any,
        parameters: dict[str, Tensor],
        averages: dict[str, Tensor],
    ) -> None:
        """Give what was loaded into :meth:`describe` to the ranks that need a part of it."""
        buffers = dict(self.modules.named_buffers())
        with torch.no_grad():
            for name in loaded["model"].keys() & buffers.keys():
                buffers[name].copy_(loaded["model"][name])
        for name in self.trained:
            weight, average = parameters[name].detach(), averages[name]
            weight.copy_(self._my_part(name, loaded["model"], weight.dtype))
            average.copy_(self._my_part(name, loaded["ema"], torch.float32))
            for kind in (MASTER, *MOMENTS):
                value = self._my_part(name, loaded["optimizer"][kind], torch.float32)
                self._set_optimizer_state(name, kind, value)
        for each in flat_parameters(optimizer):
            optimizer.optimizer.state[each]["step"].fill_(loaded["optimizer"]["step"])

    def _choose_writers(self) -> dict[str, int]:
        """Return the rank (of the world) that writes each tensor, so that those of a group write about as much."""
        written: dict[dist.ProcessGroup, dict[int, int]] = {}
        writers = {}
        for name, shape in self.shapes.items():
            group = self.groups[name]
            loads = written.setdefault(group, dict.fromkeys(dist.get_process_group_ranks(group), 0))
            writers[name] = min(loads, key=lambda rank: loads[rank])
            loads[writers[name]] += prod(shape)
        return writers

    def _describe(
        self, prefix: str, gather: Callable[[str], Tensor], is_loading: bool, dtype: torch.dtype | None
    ) -> ShardedStateDict:
        """Describe one kind of tensor of every trained parameter, those that this rank writes."""
        described = {}
        for name in self.trained:
            entry, is_mine = self.entries[name], self.writers[name] == dist.get_rank()
            assert isinstance(entry, ShardedTensor)
            dtype_here = dtype or entry.dtype
            data = None if is_loading else gather(name)  # all ranks
            if is_mine:
                if data is None:
                    data = torch.empty(self.shapes[name], dtype=dtype_here)
                kept = data.to("cpu", dtype_here, copy=True)
                described[name] = replace(
                    entry, key=prefix + entry.key, data=kept, dtype=dtype_here, replica_id=(0, 0, 0)
                )
        return described

    def _whole(self, name: str, part: Tensor) -> Tensor:
        """Put a parameter, or its average, together from the ranks' parts."""
        if not self.partitions_parameters:
            return part.detach()
        group = self.groups[name]
        flat = part.detach().to(self._device(), copy=False).contiguous()
        gathered = flat.new_empty(group.size() * flat.numel())
        dist.all_gather_into_tensor(gathered, flat, group=group)
        shape = self.shapes[name]
        return gathered[: prod(shape)].view(shape)

    def _optimizer_state(self, kind: str, name: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self.trained[name]
        if kind == MASTER:
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    def _set_optimizer_state(self, name: str, kind: str, value: Tensor) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        parameter = self.trained[name]
        if self.partitions_parameters:
            if kind == MASTER:
                safe_set_local_fp32_param(parameter, value)
            else:
                safe_set_local_optimizer_state(parameter, value, kind)
        elif kind == MASTER:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def _my_part(self, name: str, loaded: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Hand a loaded tensor from the rank that has it to all; returns this rank's part of it."""
        shape, group = self.shapes[name], self.groups[name]
        if name in loaded:
            whole = loaded[name].to(self._device(), dtype)
        else:
            whole = torch.empty(shape, dtype=dtype, device=self._device())
        dist.broadcast(whole, src=self.writers[name], group=group)
        if not self.partitions_parameters:
            return whole
        length = -(-whole.numel() // group.size())  # of a shard; the last is filled up
        flat = whole.new_zeros(group.size() * length)
        flat[: whole.numel()] = whole.flatten()
        return flat[group.rank() * length :][:length]

    @staticmethod
    def _device() -> torch.device:
        device = torch.cuda.current_device()
        return device if isinstance(device, torch.device) else torch.device("cuda", device)
