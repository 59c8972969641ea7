"""How fast a run is, and how long it will still take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.data.batch import Batch
from rmoe_megatron.distributed.device import peak_flops, synchronize
from rmoe_megatron.model.flops import training_flops_per_sample


class Throughput:
    """Samples and tokens per second, model FLOPs utilisation and remaining time; pauses are counted apart.

    A pause is what happens between steps, every so many of them: validation, sampling, saving.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.device = device
        self.config = config
        peak = peak_flops(device)
        self.peak = peak * dist.get_world_size() if peak else None
        self.steps = self.samples = self.tokens = 0  # since the last report, of all ranks
        self.flops = 0.0
        self.waited = 0.0  # seconds, for data
        self.started = time.perf_counter()
        self.seconds_per_step: float | None = None  # at the last report
        self.pauses: dict[str, float] = {}  # seconds per step that each kind of pause adds

    def count(self, micro_batches: list[Batch], waited: float) -> None:
        """Add one step: this rank's micro-batches, like those of the others, and the seconds in which it waited for them."""
        self.steps += 1
        self.waited += waited
        ranks = parallel_state.get_data_parallel_world_size()
        for batch in micro_batches:
            samples, _, height, width = batch.latents.shape
            vision = height * width // self.config.model.patch_size**2
            self.samples += ranks * samples
            self.tokens += ranks * samples * (self.config.model.text_length + vision)
            self.flops += ranks * samples * training_flops_per_sample(self.config, vision)

    def rates(self) -> dict[str, float]:
        """Return the rates since the last call and start anew."""
        synchronize(self.device)
        seconds = time.perf_counter() - self.started
        self.seconds_per_step, wait_per_step = seconds / self.steps, self.waited / self.steps
        rates = {
            "samples_per_second": self.samples / seconds,
            "tokens_per_step": self.tokens / self.steps,
            "tokens_per_second": self.tokens / seconds,
            "model_tflops": self.flops / seconds / 1e12,
            "data_wait_seconds": wait_per_step,
        }
        if self.peak:
            rates["model_flops_utilisation"] = self.flops / seconds / self.peak
        self.steps = self.samples = self.tokens = 0
        self.flops, self.waited, self.started = 0.0, 0.0, time.perf_counter()
        return rates

    def remaining(self, steps: int) -> float | None:
        """Return the seconds that ``steps`` more steps will take with their pauses, None before the first report."""
        if self.seconds_per_step is None:
            return None
        return steps * (self.seconds_per_step + sum(self.pauses.values()))

    @contextmanager
    def paused(self, kind: str, every: int) -> Iterator[None]:
        """Leave the time spent in the context out of the rates and spread it over the ``every`` steps it is for."""
        synchronize(self.device)
        paused_at = time.perf_counter()
        yield
        synchronize(self.device)
        seconds = time.perf_counter() - paused_at
        self.started += seconds
        self.pauses[kind] = seconds / every
