"""Optimizer steps with DeepSpeed's ZeRO: stages 1, 2 and 3 over the data-parallel ranks."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn

from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.data.batch import Batch, Conditions
from rmoe_megatron.diffusion.loss import DiffusionLoss, model_arguments
from rmoe_megatron.engine.deepspeed.expert_groups import expert_groups_registered, mark_experts
from rmoe_megatron.engine.deepspeed.library import deepspeed_config, import_deepspeed
from rmoe_megatron.engine.deepspeed.optimizer import build_adam, create_adam_state
from rmoe_megatron.engine.deepspeed.state import ZeroState
from rmoe_megatron.engine.gate_health import gate_health
from rmoe_megatron.engine.lr_schedule import build_schedule
from rmoe_megatron.engine.prefetching import prefetched
from rmoe_megatron.engine.protocol import MainWeight, StepResult
from rmoe_megatron.engine.router_metrics import begin_step, load_balancing_loss
from rmoe_megatron.engine.suspects import find_suspects
from rmoe_megatron.model.recurrence.gate_watch import GateWatch


class DeepSpeedEngine:
    """The :class:`rmoe_megatron.engine.protocol.Engine` on DeepSpeed.

    The layers are Megatron-Core's, each whole on every data-parallel rank but for modules, which expert parallelism spreads;
    ZeRO shards the optimizer's state, from stage 2 the gradients, at stage 3 the parameters themselves, which are gathered
    layer by layer when they are used.

    Args:
        modules: one DiffusionTransformer, whole but for its experts, of which it has this rank's.
    """

    def __init__(self, config: RunConfig, modules: nn.ModuleList, loss: DiffusionLoss) -> None:
        self.config, self.modules, self.loss = config, modules, loss
        self.device = loss.null_conditions.device
        self.partitions_parameters = config.deepspeed.zero_stage == 3
        self.num_micro_batches = 0  # of the last step
        self.watch: GateWatch | None = None  # of the last step
        (model,) = modules
        expert_ranks = config.parallel.expert_model_parallel_size
        mark_experts(model.parameters(), expert_ranks)
        trained: dict[str, Any] = {
            name: parameter for name, parameter in modules.named_parameters() if parameter.requires_grad
        }
        self.state = ZeroState(modules, trained, self.partitions_parameters)
        adam = build_adam(config, trained)
        deepspeed = import_deepspeed(on_cpu=self.device.type == "cpu")
        # It prints the memory there is, whatever its log's level.
        with expert_groups_registered(model, expert_ranks, trained.values()), redirect_stdout(io.StringIO()):
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=adam, config=deepspeed_config(config), dist_init_required=False
            )
        create_adam_state(self.optimizer)
        self.scheduler = build_schedule(config, self.optimizer)
        self.parameters: dict[str, Tensor] = {
            name: parameter.ds_tensor if self.partitions_parameters else parameter
            for name, parameter in trained.items()
        }
        if self.partitions_parameters:
            self.state.clear_padding(self.parameters)
        self.deepspeed.train()

    def step(
        self,
        micro_batches: list[Batch],
        before_update: Callable[[], None] = lambda: None,
        watches_gates: bool = False,
    ) -> StepResult:
        """Update the weights by the micro-batches of one step; see the protocol."""
        self.num_micro_batches = len(micro_batches)
        self.watch = GateWatch() if watches_gates else None
        begin_step(self.modules, self.watch)
        # As Megatron-Core's schedule does: the gate's losses enter the backward pass with the scale of the loss.
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=self.device) / len(micro_batches))
        learning_rate = self.scheduler.get_lr({})  # of groups without one of their own
        losses = []
        for number, batch in enumerate(prefetched(micro_batches, self.device)):
            self.deepspeed.set_gradient_accumulation_boundary(number + 1 == len(micro_batches))
            loss = self._loss(batch)
            losses.append(loss.detach())
            # DeepSpeed leaves out an update whose gradients are not finite; of a loss that is not, make them so.
            scale = torch.where(losses[-1].isfinite(), 1 / len(micro_batches), torch.nan)
            self.deepspeed.backward(loss * scale)
        before_update()
        self.deepspeed.step()
        mean = self._mean(losses)
        grad_norm = torch.as_tensor(self.deepspeed.get_global_grad_norm(), device=self.device)
        loss_value, norm_value = torch.stack((mean, grad_norm.to(mean.dtype))).tolist()
        if not self.deepspeed.was_step_applied():
            if self.config.deepspeed.offload_optimizer and not self.partitions_parameters:
                # In bf16 DeepSpeed keeps these sums, and every later step would add to what is not finite.
                self.optimizer.averaged_gradients.clear()
            return StepResult(loss_value, norm_value, learning_rate, find_suspects(micro_batches, losses))
        self.scheduler.step(increment=1)
        return StepResult(loss_value, norm_value, learning_rate)

    @torch.no_grad()
    def evaluate(self, micro_batches: list[Batch]) -> float:
        """Return the mean loss of all ranks' micro-batches without updating anything."""
        with self._evaluating():
            losses = [self._loss(batch) for batch in prefetched(micro_batches, self.device)]
        return self._mean(losses).item()

    @torch.no_grad()
    def denoise(self, latents: Tensor, timestep: Tensor, rng_keys: Tensor, conditions: Conditions) -> Tensor:
        """Return the model's output float32 [B, C or 2 C, height, width]; every rank computes the same."""
        with self._evaluating():
            output: Tensor = self.deepspeed(**model_arguments(latents, timestep, rng_keys, conditions))
        return output

    def main_weights(self) -> dict[str, MainWeight]:
        """Return the optimizer's float32 weights, which ZeRO spreads over ranks; at stage 3 as it does the parameters."""
        return self.state.main_weights(self.parameters)

    def gather_parameters(self) -> None:
        """Return at once: a step ends with the parameters of its update where they belong."""

    def routing_metrics(self) -> dict[str, float]:
        """Return what the gates of the last step report; the host waits for it."""
        metrics = load_balancing_loss(self.config, self.num_micro_batches, self.device)
        if self.watch is not None:
            drawn_time = self.loss.objective.drawn_time
            metrics |= gate_health(self.config, self.watch.calls, drawn_time, self.device)
        return metrics

    def _loss(self, batch: Batch) -> Tensor:
        noised = self.loss.add_noise(batch)
        return noised.loss(self.deepspeed(**noised.model_inputs()))

    def _mean(self, losses: list[Tensor]) -> Tensor:
        """Average over this rank's micro-batches and over all ranks."""
        mean = torch.stack(losses).mean()
        group = parallel_state.get_data_parallel_group()
        dist.all_reduce(mean, group=group)
        return mean / group.size()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self._forget_copies()
        self.deepspeed.eval()
        try:
            yield
        finally:
            self.deepspeed.train()
            self._forget_copies()

    def _forget_copies(self) -> None:
        """Let nothing be read that is older than the shards: whole parameters, and zero_hpz_partition_size's second shards."""
        if self.partitions_parameters:
            self.deepspeed.empty_partition_cache()
            self.optimizer.invalidate_secondary_tensor()

    def state_keys(self) -> dict[str, str]:
        """Return the names in the whole model of its parts."""
        return self.state.state_keys

    def sharded_state(self, averages: dict[str, Tensor], is_loading: bool) -> dict[str, Any]:
        """Describe weights, averages, optimizer and schedule so that any stage and number of ranks can load them."""
        state = self.state.describe(self.optimizer, self.parameters, averages, is_loading)
        return state | {"scheduler": self.scheduler.state_dict()}

    def load_state(self, loaded: dict[str, Any], averages: dict[str, Tensor]) -> None:
        """Take over everything that was saved; learning rates, betas and eps stay those of the configuration."""
        self.state.take(loaded, self.optimizer, self.parameters, averages)
        self._forget_copies()
        self.scheduler.load_state_dict(loaded["scheduler"])
