"""One optimizer step: Megatron-Core's forward-backward schedule, gradient finalisation and optimizer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from rmoe_megatron.config.schema import RunConfig
from rmoe_megatron.counter_rng import sample_keys
from rmoe_megatron.diffusion.build import build_objective
from rmoe_megatron.diffusion.guidance import Conditions, drop_conditions

Batch = dict[str, Tensor]  # latents, sample_index, and the model's conditions


@dataclass
class StepResult:
    """What one optimizer step did; the loss is the mean over the global batch."""

    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool


class TrainingStep:
    """Runs optimizer steps of one model.

    Args:
        null_conditions: of the empty caption or the dropped label, each [1, ...].
    """

    def __init__(
        self,
        config: RunConfig,
        model: DistributedDataParallel,
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

    def __call__(self, micro_batches: Iterator[Batch]) -> StepResult:
        """Consume the micro-batches of one step and update the weights."""
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self._schedule(micro_batches, self.num_micro_batches, forward_only=False)
        updated, grad_norm, _ = self.optimizer.step()
        if updated:
            self.scheduler.step(increment=1)
        return StepResult(
            loss=mean_over_data_parallel(losses),
            grad_norm=float(grad_norm or 0.0),
            learning_rate=learning_rate,
            skipped=not updated,
        )

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterator[Batch], num_micro_batches: int) -> float:
        """Return the mean loss over ``num_micro_batches`` micro-batches per rank without updating anything."""
        self.model.eval()
        losses = self._schedule(micro_batches, num_micro_batches, forward_only=True)
        self.model.train()
        return mean_over_data_parallel(losses)

    def _schedule(self, micro_batches: Iterator[Batch], count: int, forward_only: bool) -> list[Tensor]:
        model = self.config.model
        stored = self.forward_backward(
            forward_step_func=self.forward_step,
            data_iterator=micro_batches,
            model=[self.model],
            num_microbatches=count,
            seq_length=model.text_length + (model.sample_size // model.patch_size) ** 2,
            micro_batch_size=self.config.training.micro_batch_size,
            forward_only=forward_only,
        )
        return [entry["loss"] for entry in stored]

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
