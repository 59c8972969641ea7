"""Optimizer steps with Megatron-Core: forward-backward schedule, gradient finalisation, optimizer."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from rmoe_megatron.checkpoint.model_state import (
    averages_state,
    full_state,
    model_state,
    take_tensors,
    without_objects,
)
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.data.batch import Batch, Conditions
from rmoe_megatron.diffusion.loss import DiffusionLoss, model_arguments
from rmoe_megatron.engine.gate_health import gate_health
from rmoe_megatron.engine.megatron.chunks import ModelChunks, data_parallelism
from rmoe_megatron.engine.megatron.fp8_state import load_scales, sharded_scales
from rmoe_megatron.engine.megatron.gradient_norm import clip_gradients, gradient_norm
from rmoe_megatron.engine.megatron.optimizer import (
    OPTIMIZER_FORMAT,
    build_optimizer,
    create_state,
    load_optimizer,
    main_weights,
)
from rmoe_megatron.engine.prefetching import prefetched
from rmoe_megatron.engine.protocol import MainWeight, StepResult
from rmoe_megatron.engine.router_metrics import begin_step, load_balancing_loss
from rmoe_megatron.engine.suspects import find_suspects
from rmoe_megatron.model.recurrence.gate_watch import GateWatch
from rmoe_megatron.model.sequence import num_shards, padded_length


class MegatronEngine:
    """The :class:`rmoe_megatron.engine.protocol.Engine` on Megatron-Core.

    Args:
        modules: this rank's chunk of the DiffusionTransformer, or with the interleaved schedule several.
    """

    def __init__(self, config: RunConfig, modules: nn.ModuleList, loss: DiffusionLoss) -> None:
        self.config, self.modules, self.loss = config, modules, loss
        self.device = loss.null_conditions.device
        self.model = ModelChunks(modules, data_parallelism(config))
        self.optimizer, self.scheduler = build_optimizer(config, self.model)
        self.parameters: dict[str, Tensor] = {
            name: parameter for name, parameter in modules.named_parameters() if parameter.requires_grad
        }
        self.num_micro_batches = 0  # of the last step
        self.watch: GateWatch | None = None  # of the last step
        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.model.config.grad_scale_func = self.optimizer.scale_loss
        self.forward_backward = get_forward_backward_func()
        self.model.train()

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
        learning_rate = self.scheduler.get_lr({})  # of groups without one of their own
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self._losses(micro_batches, forward_only=False)
        before_update()
        self.optimizer.prepare_grads()
        mean = mean_over_data_parallel(losses)
        # Both in one copy to the host, the only one of a step.
        loss, grad_norm = torch.stack((mean, gradient_norm(self.optimizer))).tolist()
        # Megatron-Core's optimizer looks for NaN under float16's loss scaling only: with NaN gradients it would update.
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return StepResult(loss, grad_norm, learning_rate, find_suspects(micro_batches, losses))
        clip_gradients(self.optimizer, self.config.optimizer.clip_grad, grad_norm)
        self.optimizer.step_with_ready_grads()
        self.scheduler.step(increment=1)
        return StepResult(loss, grad_norm, learning_rate)

    @torch.no_grad()
    def evaluate(self, micro_batches: list[Batch]) -> float:
        """Return the mean loss of all ranks' micro-batches without updating anything."""
        self.model.train(False)
        losses = self._losses(micro_batches, forward_only=True)
        self.model.train()
        return mean_over_data_parallel(losses).item()

    @torch.no_grad()
    def denoise(self, latents: Tensor, timestep: Tensor, rng_keys: Tensor, conditions: Conditions) -> Tensor:
        """Return the model's output float32 [B, C or 2 C, height, width] on every rank, through all pipeline stages."""
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        size = -(-len(latents) // stages)  # one micro-batch per stage, as the interleaved schedule needs
        padded = torch.arange(stages * size, device=latents.device).clamp(max=len(latents) - 1)
        inputs = model_arguments(latents, timestep, rng_keys, conditions)
        parts = {name: values[padded].split(size) for name, values in inputs.items()}
        batches = [{name: values[number] for name, values in parts.items()} for number in range(stages)]

        def forward_step(
            batches: Iterator[dict[str, Tensor]], model: Callable[..., Tensor]
        ) -> tuple[Tensor, Any]:
            return model(**next(batches)), lambda output, non_loss_data: output

        self.model.train(False)
        outputs = self._run_schedule(
            forward_step,
            [iter(batches) for _ in self.model.wrapped],
            len(batches),
            (size, *latents.shape[2:]),
            forward_only=True,
            collect_non_loss_data=True,
        )
        self.model.train()
        if stages == 1:
            return outputs[0]
        channels = latents.shape[1] * (2 if self.config.model.learned_sigma else 1)
        output = latents.new_empty(len(padded), channels, *latents.shape[2:], dtype=torch.float32)
        if outputs:
            output = torch.cat(outputs)
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(output, last, group=parallel_state.get_pipeline_model_parallel_group())
        return output[: len(latents)]

    def main_weights(self) -> dict[str, MainWeight]:
        """Return the optimizer's float32 weights of parameters that are not; the distributed optimizer spreads them over ranks."""
        is_sharded = self.config.optimizer.distributed_optimizer
        return main_weights(self.optimizer, self.parameters, is_sharded)

    def gather_parameters(self) -> None:
        """Wait until the parameters of the last update have come from the other ranks."""
        self.model.gather_parameters()

    def routing_metrics(self) -> dict[str, float]:
        """Return what the gates of the last step report; the host waits for it."""
        metrics = load_balancing_loss(self.config, self.num_micro_batches, self.device)
        if self.watch is not None:
            drawn_time = self.loss.objective.drawn_time
            metrics |= gate_health(self.config, self.watch.calls, drawn_time, self.device)
        return metrics

    def state_keys(self) -> dict[str, str]:
        """Return the names in the whole model of what this rank has."""
        return {name: getattr(entry, "key", name) for name, entry in full_state(self.modules).items()}

    def sharded_state(self, averages: dict[str, Tensor], is_loading: bool) -> dict[str, Any]:
        """Describe weights, averages, optimizer, schedule and histories of scales so that any parallel layout can load them."""
        model = model_state(self.modules)
        create_state(self.optimizer)  # before the first update, or after steps that were all left out
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=OPTIMIZER_FORMAT)
        for part in optimizer.values():
            # What a rank without parameters of a part has of their moments: Megatron-Core would take it for state of all ranks.
            if isinstance(part, dict) and not part.get("param_state", True):
                del part["param_state"]
        if is_loading:
            model = without_objects(model)
        state = {"model": model, "ema": averages_state(model, averages)}
        state |= {"optimizer": optimizer, "scheduler": self.scheduler.state_dict()}
        scales = sharded_scales(self.modules)
        return state | ({"fp8": scales} if scales else {})

    def load_state(self, loaded: dict[str, Any], averages: dict[str, Tensor]) -> None:
        """Take over everything that was saved; learning rates, betas and eps stay those of the configuration."""
        is_whole = len(self.parameters) == len(list(self.modules.parameters()))  # what is frozen is not saved
        take_tensors(self.modules, loaded["model"], is_whole)
        for name, average in loaded["ema"].items():
            averages[name].copy_(average)
        load_optimizer(self.optimizer, loaded["optimizer"], loaded["scheduler"])
        self.scheduler.load_state_dict(loaded["scheduler"])
        load_scales(self.modules, loaded.get("fp8", {}))

    def _losses(self, batches: list[Batch], forward_only: bool) -> list[Tensor]:
        """Return the losses of micro-batches on the last pipeline stage, nothing before it."""
        latents = batches[
            0
        ].latents  # with pipeline parallelism they are all of one size, elsewhere nothing asks
        stored = self._run_schedule(
            self.forward_step,
            # Every chunk takes them in turn.
            [prefetched(batches, self.device) for _ in self.model.wrapped],
            len(batches),
            (len(latents), *latents.shape[2:]),
            forward_only,
        )
        return [entry["loss"] for entry in stored]

    def _run_schedule(
        self,
        forward_step: Callable[..., Any],
        iterators: list[Iterator[Any]],
        num_micro_batches: int,
        size: tuple[int, int, int],
        forward_only: bool,
        collect_non_loss_data: bool = False,
    ) -> list[Any]:
        """Run Megatron-Core's schedule over micro-batches of this many samples of latents of this height and width."""
        model, (samples, height, width) = self.config.model, size
        text_length = padded_length(model.text_length, num_shards(self.model.config))
        return self.forward_backward(
            forward_step_func=forward_step,
            data_iterator=iterators,
            model=self.model.wrapped,
            num_microbatches=num_micro_batches,
            seq_length=text_length + height * width // model.patch_size**2,
            micro_batch_size=samples,
            forward_only=forward_only,
            collect_non_loss_data=collect_non_loss_data,
        )

    def forward_step(
        self, micro_batches: Iterator[Batch], model: Callable[..., Tensor]
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]:
        """Add noise to one micro-batch and run the model on it (Megatron-Core's ``forward_step_func``)."""
        noised = self.loss.add_noise(next(micro_batches))

        def loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            value = noised.loss(output)
            # A copy: Megatron-Core's schedule divides the loss by the number of micro-batches in place.
            return value, {"loss": value.detach().clone()}

        return model(**noised.model_inputs()), loss


def mean_over_data_parallel(losses: list[Tensor]) -> Tensor:
    """Average micro-batch losses over this rank's micro-batches and over data-parallel ranks: a float32 scalar.

    With pipeline parallelism only the last stage has losses; it hands the mean to the other stages.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    device = losses[0].device if losses else torch.cuda.current_device()
    mean = torch.stack(losses).mean() if losses else torch.zeros((), device=device)
    torch.distributed.all_reduce(
        mean, op=torch.distributed.ReduceOp.SUM, group=parallel_state.get_data_parallel_group()
    )
    mean /= parallel_state.get_data_parallel_world_size()
    torch.distributed.broadcast(mean, src=last, group=group)
    return mean
