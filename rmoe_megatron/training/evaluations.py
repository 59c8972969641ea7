"""Benchmarks between the steps of a run, by the averaged weights: all ranks draw and judge, rank 0 sums up and writes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray
from torch import Tensor

from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.data.batch import Prompts
from rmoe_megatron.distributed.device import inference_device
from rmoe_megatron.distributed.launch import local_rank
from rmoe_megatron.encoders.autoencoder import Autoencoder, decode_latents
from rmoe_megatron.training.benchmarks import Benchmark, Evaluated
from rmoe_megatron.training.sample_grid import Denoiser, sample_latents

BATCH = 32  # prompts that a rank draws at a time


class Evaluation:
    """A benchmark whose prompts are always drawn from the same noise.

    The judge's models wait in every rank's host memory, and are on its GPU only while it judges.

    Args:
        prompts: the encoded captions of the benchmark, on every rank.

    Raises:
        UserError: the judge is not here and cannot be downloaded.
    """

    def __init__(
        self, config: RunConfig, benchmark: Benchmark, prompts: Prompts, autoencoder: Autoencoder
    ) -> None:
        self.config, self.benchmark, self.prompts, self.autoencoder = config, benchmark, prompts, autoencoder
        self.models: Any = None
        if benchmark.load is not None:
            self.models = benchmark.load().to(torch.device("cpu"))

    def run(
        self, denoise: Denoiser, height: int, width: int, check: Callable[[], None] = lambda: None
    ) -> Evaluated | None:
        """Draw a picture for every prompt, in latents of this size, and judge them; only rank 0 returns the result.

        Data-parallel ranks share the drawing. Each takes as many batches of as many prompts, which their collectives ask for: what is
        too many repeats the last prompt. All ranks share the judging, also those that draw the same pictures together.

        Args:
            denoise: an engine's method; every rank calls it as often.
            check: called by every rank before each picture that it judges, as often by all; it may raise to stop.
        """
        group, number = parallel_state.get_data_parallel_group(), len(self.benchmark.captions)
        share = -(-number // group.size())
        mine = torch.arange(group.rank() * share, (group.rank() + 1) * share).clamp(max=number - 1)
        drawn = []
        for numbers in mine.split(BATCH):
            latents = sample_latents(
                denoise, self._part(numbers), self.config, height, width, numbers=numbers
            )
            drawn.append(decode_latents(self.autoencoder, latents))
        images = _gathered(torch.cat(drawn).to(self.prompts.conditions.device), group)[:number]
        pixels = images.cpu().numpy()
        verdicts = self._judged(pixels, check)
        return self.benchmark.summarise(verdicts, pixels) if dist.get_rank() == 0 else None

    def _part(self, numbers: Tensor) -> Prompts:
        conditions = self.prompts.conditions
        captions = [self.prompts.captions[number] for number in numbers.tolist()]
        places = numbers.to(conditions.device)
        return Prompts(captions, conditions.map(lambda values: values[places]), self.prompts.null_conditions)

    def _judged(self, pixels: NDArray[np.uint8], check: Callable[[], None]) -> list[Any]:
        """Judge this rank's share of the pictures uint8 [N, H, W, 3]; returns the verdicts of all ranks, in order."""
        share = -(-len(pixels) // dist.get_world_size())
        verdicts = []
        try:
            if self.models is not None:
                self.models.to(inference_device(local_rank()))
            for number in range(dist.get_rank() * share, (dist.get_rank() + 1) * share):
                check()
                if number < len(pixels):
                    verdicts.append(self.benchmark.judge(self.models, number, pixels[number]))
        finally:
            if self.models is not None:
                self.models.to(torch.device("cpu"))
        everyone: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, verdicts)
        return [verdict for of_rank in everyone for verdict in of_rank]


def _gathered(images: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the images uint8 [N, H, W, 3] of all ranks of a group, in their order."""
    parts = [torch.empty_like(images) for _ in range(group.size())]
    dist.all_gather(parts, images.contiguous(), group=group)
    return torch.cat(parts)
