"""Adds noise to a batch for the model, and computes the loss of the model's output. It knows no engine."""

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from rmoe_megatron.config.model import DiffusionConfig, ModelDescription
from rmoe_megatron.counter_rng import sample_keys
from rmoe_megatron.data.batch import Batch, Conditions
from rmoe_megatron.diffusion.build import build_objective
from rmoe_megatron.diffusion.depth_loss import depth_loss
from rmoe_megatron.diffusion.guidance import drop_conditions
from rmoe_megatron.diffusion.objective import NoisedLatents, TrainingObjective


@dataclass(frozen=True)
class NoisedBatch:
    """A batch with noise and with some conditions dropped: the model's inputs, and the loss of its output."""

    latents: NoisedLatents
    rng_keys: Tensor  # int64 [B], of the counter-based random numbers
    conditions: Conditions
    objective: TrainingObjective
    diffusion: DiffusionConfig

    def model_inputs(self) -> dict[str, Tensor]:
        """Return the arguments of a DiffusionTransformer."""
        noisy, timestep = self.latents.noisy_latents, self.latents.timestep
        return model_arguments(noisy, timestep, self.rng_keys, self.conditions)

    def loss(self, output: Tensor) -> Tensor:
        """Return the mean loss of the model's output [B, C or 2 C, H, W], or of D depths [D, B, ...], a float32 scalar."""
        if output.dim() == self.latents.target.dim():
            return self.objective.loss(output, self.latents)
        return depth_loss(self.diffusion, output, partial(self.objective.loss, noised=self.latents))


class DiffusionLoss:
    """Noises batches and drops conditions, by numbers that depend on seed and draw alone.

    Args:
        null_conditions: what the empty caption or the dropped label is encoded to, each [1, ...], on the device where batches will be.
    """

    def __init__(self, description: ModelDescription, seed: int, null_conditions: Conditions) -> None:
        self.diffusion, self.seed, self.null_conditions = description.diffusion, seed, null_conditions
        self.objective = build_objective(description, null_conditions.device)

    def add_noise(self, batch: Batch) -> NoisedBatch:
        """Return the batch with noise at its samples' timesteps, and with the null condition where one is dropped."""
        rng_keys = sample_keys(self.seed, batch.draw_index)
        latents = self.objective.add_noise(batch.latents, rng_keys, batch.time)
        conditions = drop_conditions(self.diffusion, batch.conditions, self.null_conditions, rng_keys)
        return NoisedBatch(latents, rng_keys, conditions, self.objective, self.diffusion)


def model_arguments(
    latents: Tensor, timestep: Tensor, rng_keys: Tensor, conditions: Conditions
) -> dict[str, Tensor]:
    """Return the arguments of a DiffusionTransformer; see its ``forward``."""
    return {"latents": latents, "timestep": timestep, "rng_keys": rng_keys, **conditions.tensors()}
