"""From a batch to what the model sees, and from its answer to the loss. Knows no engine."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from rmoe_megatron.config.model import DiffusionConfig, ModelDescription
from rmoe_megatron.counter_rng import sample_keys
from rmoe_megatron.data.batch import Batch, Conditions
from rmoe_megatron.diffusion.build import build_objective
from rmoe_megatron.diffusion.depth_loss import depth_loss
from rmoe_megatron.diffusion.guidance import drop_conditions
from rmoe_megatron.diffusion.objective import TrainingExample, TrainingObjective


@dataclass(frozen=True)
class Question:
    """A noised batch as the model is asked about it."""

    example: TrainingExample
    keys: Tensor  # int64 [B], of the counter-based random numbers
    conditions: Conditions
    objective: TrainingObjective
    diffusion: DiffusionConfig

    def arguments(self) -> dict[str, Tensor]:
        """Return the model's arguments."""
        noisy, timestep = self.example.noisy_latents, self.example.timestep
        return model_arguments(noisy, timestep, self.keys, self.conditions)

    def loss(self, output: Tensor) -> Tensor:
        """Return the mean loss of the model's output [B, C or 2 C, H, W], or of D depths [D, B, ...], a float32 scalar."""
        if output.dim() == self.example.target.dim():
            return self.objective.loss(output, self.example)
        return depth_loss(self.diffusion, output, partial(self.objective.loss, example=self.example))


class DiffusionLoss:
    """Noises batches and drops conditions, by numbers that depend on seed and draw alone.

    Args:
        null_conditions: of the empty caption or the dropped label, each [1, ...], on the device where batches will be.
    """

    def __init__(self, description: ModelDescription, seed: int, null_conditions: Conditions) -> None:
        self.diffusion, self.seed, self.null_conditions = description.diffusion, seed, null_conditions
        self.objective = build_objective(description, null_conditions.device)

    def ask(self, batch: Batch) -> Question:
        """Return the question that a batch is to the model."""
        keys = sample_keys(self.seed, batch.sample_index)
        example = self.objective.add_noise(batch.latents, keys, batch.time)
        conditions = drop_conditions(self.diffusion, batch.conditions, self.null_conditions, keys)
        return Question(example, keys, conditions, self.objective, self.diffusion)


def model_arguments(
    latents: Tensor, timestep: Tensor, keys: Tensor, conditions: Conditions
) -> dict[str, Tensor]:
    """Return the arguments of a DiffusionTransformer; see its ``forward``."""
    return {"latents": latents, "timestep": timestep, "sample_keys": keys, **conditions.tensors()}
