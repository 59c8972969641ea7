"""One optimizer step: Megatron-Core's forward-backward schedule, gradient finalisation and optimizer."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.counter_rng import sample_keys
from rmoe_megatron.diffusion.build import build_objective
from rmoe_megatron.diffusion.guidance import Conditions, drop_conditions
from rmoe_megatron.model.family import vision_tokens
from rmoe_megatron.model.sequence import num_shards, padded_length
from rmoe_megatron.training.health import Suspect, find_suspects
from rmoe_megatron.training.setup import ModelChunks

Batch = dict[str, Tensor]  # latents, sample_index, and the model's conditions


@dataclass
class StepResult:
    """What one optimizer step did; the loss is the mean over the global batch.

    If loss or gradient norm is not finite, the weights are left alone and ``suspects`` are the samples that may have
    spoilt the step; else it is None.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    suspects: list[Suspect] | None = None


class TrainingStep:
    """Runs optimizer steps of one model.

    Args:
        null_conditions: of the empty caption or the dropped label, each [1, ...].
    """

    def __init__(
        self,
        config: RunConfig,
        model: ModelChunks,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        null_conditions: Conditions,
    ) -> None:
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.null_conditions = null_conditions
        self.device = next(iter(null_conditions.values())).device
        self.objective = build_objective(config)
        data_parallel = parallel_state.get_data_parallel_world_size()
        training = config.training
        self.num_micro_batches = training.global_batch_size // (training.micro_batch_size * data_parallel)
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.grad_scale_func = optimizer.scale_loss
        self.forward_backward = get_forward_backward_func()

    def __call__(
        self, micro_batches: Iterator[Batch], before_update: Callable[[], None] = lambda: None
    ) -> StepResult:
        """Consume the micro-batches of one step and update the weights.

        Args:
            before_update: called when the gradients are there. Only then are the parameters of the previous update
                surely here: with ``overlap_param_gather`` they arrive during the forward pass.
        """
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        batches = [next(micro_batches) for _ in range(self.num_micro_batches)]
        losses = self._losses(batches, forward_only=False)
        before_update()
        # Megatron-Core's optimizer looks for NaN under float16's loss scaling only: with NaN gradients it would update.
        self.optimizer.prepare_grads()
        loss, grad_norm = mean_over_data_parallel(losses), float(self.optimizer.get_grad_norm() or 0.0)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return StepResult(loss, grad_norm, learning_rate, find_suspects(batches, losses))
        self.optimizer.step()
        self.scheduler.step(increment=1)
        return StepResult(loss, grad_norm, learning_rate)

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterator[Batch], num_micro_batches: int) -> float:
        """Return the mean loss over ``num_micro_batches`` micro-batches per rank without updating anything."""
        self.model.train(False)
        losses = self._losses([next(micro_batches) for _ in range(num_micro_batches)], forward_only=True)
        self.model.train()
        return mean_over_data_parallel(losses)

    @torch.no_grad()
    def denoise(self, latents: Tensor, timestep: Tensor, sample_keys: Tensor, **conditions: Tensor) -> Tensor:
        """Return the model's output float32 [B, C or 2 C, height, width] on every rank, through all pipeline stages.

        Arguments are the model's; every rank gives the same ones.
        """
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        size = -(-len(latents) // stages)  # one micro-batch per stage, as the interleaved schedule needs
        padded = torch.arange(stages * size, device=latents.device).clamp(max=len(latents) - 1)
        inputs = {"latents": latents, "timestep": timestep, "sample_keys": sample_keys, **conditions}
        parts = {name: values[padded].split(size) for name, values in inputs.items()}
        batches = [{name: values[number] for name, values in parts.items()} for number in range(stages)]

        def forward_step(batches: Iterator[Batch], model: Callable[..., Tensor]) -> tuple[Tensor, Any]:
            return model(**next(batches)), lambda output, non_loss_data: output

        outputs = self._run_schedule(
            forward_step, batches, size, forward_only=True, collect_non_loss_data=True
        )
        if stages == 1:
            return outputs[0]
        channels = latents.shape[1] * (2 if self.config.model.learned_sigma else 1)
        output = latents.new_empty(len(padded), channels, *latents.shape[2:], dtype=torch.float32)
        if outputs:
            output = torch.cat(outputs)
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(output, last, group=parallel_state.get_pipeline_model_parallel_group())
        return output[: len(latents)]

    def _losses(self, batches: list[Batch], forward_only: bool) -> list[Tensor]:
        """Return the losses of micro-batches on the last pipeline stage, nothing before it."""
        size = self.config.training.micro_batch_size
        stored = self._run_schedule(self.forward_step, batches, size, forward_only)
        return [entry["loss"] for entry in stored]

    def _run_schedule(
        self,
        forward_step: Callable[..., Any],
        batches: list[Batch],
        micro_batch_size: int,
        forward_only: bool,
        collect_non_loss_data: bool = False,
    ) -> list[Any]:
        model = self.config.model
        text_length = padded_length(model.text_length, num_shards(self.model.config))
        return self.forward_backward(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in self.model.wrapped],  # every chunk takes them in turn
            model=self.model.wrapped,
            num_microbatches=len(batches),
            seq_length=text_length + vision_tokens(model),
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
            collect_non_loss_data=collect_non_loss_data,
        )

    def forward_step(
        self, micro_batches: Iterator[Batch], model: Callable[..., Tensor]
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]]:
        """Noise one micro-batch and answer it (Megatron-Core's ``forward_step_func``)."""
        batch = {name: tensor.to(self.device) for name, tensor in next(micro_batches).items()}
        keys = sample_keys(self.config.seed, batch["sample_index"])
        example = self.objective.add_noise(batch["latents"], keys)
        conditions = {name: batch[name] for name in self.null_conditions}
        conditions = drop_conditions(self.config.diffusion, conditions, self.null_conditions, keys)
        output = model(example.noisy_latents, example.timestep, keys, **conditions)

        def loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            value = self.objective.loss(output, example)
            # A copy: Megatron-Core's schedule divides the loss by the number of micro-batches in place.
            return value, {"loss": value.detach().clone()}

        return output, loss


def mean_over_data_parallel(losses: list[Tensor]) -> float:
    """Average micro-batch losses over this rank's micro-batches and over data-parallel ranks.

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
    return mean.item()
