"""Benchmarks between the steps of a run, by the averaged weights: all ranks draw and judge, rank 0 sums up and writes."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.data.batch import Prompts
from rmoe_megatron.encoders.autoencoder import Autoencoder, decode_latents
from rmoe_megatron.launch import local_rank
from rmoe_megatron.platform import inference_device
from rmoe_megatron.training.benchmarks import Benchmark, Evaluated
from rmoe_megatron.training.samples import Denoiser, sample_latents

BATCH = 32  # prompts that a rank draws at a time


class Evaluation:
    """A benchmark whose prompts are always drawn from the same noise.

    The judge's models wait in the host's memory, of every rank that judges, and are on its GPU only while it does.

    Args:
        prompts: the encoded captions of the benchmark, on every rank.

    Raises:
        UserError: the judge cannot be had.
    """

    def __init__(
        self, config: RunConfig, benchmark: Benchmark, prompts: Prompts, autoencoder: Autoencoder
    ) -> None:
        self.config, self.benchmark, self.prompts, self.autoencoder = config, benchmark, prompts, autoencoder
        self.models: Any = None
        if benchmark.load is not None and _judges():
            self.models = benchmark.load().to(torch.device("cpu"))

    def run(self, denoise: Denoiser, height: int, width: int) -> Evaluated | None:
        """Draw a picture for every prompt, in latents of this size, and judge them; only rank 0 returns the result.

        Data-parallel ranks share the prompts. Each takes as many batches of as many prompts, which their collectives ask for: what is
        too many repeats the last prompt, and is not judged. Of ranks that share a model the first ones judge.

        Args:
            denoise: an engine's method; every rank calls it as often.
        """
        group, number = parallel_state.get_data_parallel_group(), len(self.benchmark.captions)
        share = -(-number // group.size())
        mine = torch.arange(group.rank() * share, (group.rank() + 1) * share)
        drawn = []
        for numbers in mine.clamp(max=number - 1).split(BATCH):
            latents = sample_latents(
                denoise, self._part(numbers), self.config, height, width, numbers=numbers
            )
            drawn.append(decode_latents(self.autoencoder, latents))
        images = torch.cat(drawn)
        everything = _gathered(images.to(self.prompts.conditions.device), group)[:number]
        if not _judges():
            return None
        verdicts = self._judged(images, [each for each in mine.tolist() if each < number], group)
        return self.benchmark.summarise(verdicts, everything.cpu().numpy()) if dist.get_rank() == 0 else None

    def _part(self, numbers: Tensor) -> Prompts:
        conditions = self.prompts.conditions
        captions = [self.prompts.captions[number] for number in numbers.tolist()]
        places = numbers.to(conditions.device)
        return Prompts(captions, conditions.map(lambda values: values[places]), self.prompts.null_conditions)

    def _judged(self, images: Tensor, mine: list[int], group: dist.ProcessGroup) -> list[Any]:
        """Judge this rank's pictures uint8 [N, H, W, 3] of these prompts; returns the verdicts of all ranks of the group, in order."""
        if self.models is not None:
            self.models.to(inference_device(local_rank()))
        pixels = images.cpu().numpy()
        verdicts = [
            self.benchmark.judge(self.models, number, pixels[place]) for place, number in enumerate(mine)
        ]
        if self.models is not None:
            self.models.to(torch.device("cpu"))
        everyone: list[list[Any]] = [[] for _ in range(group.size())]
        dist.all_gather_object(everyone, verdicts, group=group)
        return [verdict for of_rank in everyone for verdict in of_rank]


def _judges() -> bool:
    """Whether this rank is of the data-parallel group of rank 0, whose ranks judge."""
    return 0 in dist.get_process_group_ranks(parallel_state.get_data_parallel_group())


def _gathered(images: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the images uint8 [N, H, W, 3] of all ranks of a group, in their order."""
    parts = [torch.empty_like(images) for _ in range(group.size())]
    dist.all_gather(parts, images.contiguous(), group=group)
    return torch.cat(parts)
