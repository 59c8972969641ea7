"""The order of a run's samples and their batches: a function of the seed, independent of the parallel layout."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from rmoe_megatron.data.order import Order
from rmoe_megatron.data.training_dataset import BadSample
from rmoe_megatron.distributed import stop_signals
from rmoe_megatron.errors import UserError


class Samples(Protocol):
    """What a loader draws from."""

    def draw(self, index: int, draw: int, bad: list[BadSample] | None = None) -> dict[str, Any]:
        """Return the sample at ``index`` as the ``draw``-th draw of a run sees it."""
        ...

    def expect(self, indices: list[int]) -> None:
        """Begin to read samples that will be asked for next."""
        ...


@dataclass(frozen=True)
class BatchLayout:
    """How the draws of one optimizer step are spread.

    The first micro-batches of all data-parallel ranks are the first draws, so that draws in a row that are of one bucket give
    every rank the same work at the same time.
    """

    global_batch_size: int
    micro_batch_size: int
    data_parallel_rank: int
    data_parallel_size: int

    def micro_batches(self, first_draw: int) -> list[range]:
        """Return the draws of this rank's micro-batches for the step that starts at ``first_draw``."""
        stride = self.micro_batch_size * self.data_parallel_size
        mine = first_draw + self.data_parallel_rank * self.micro_batch_size
        return [
            range(begin, begin + self.micro_batch_size)
            for begin in range(mine, mine + self.global_batch_size, stride)
        ]

    @property
    def micro_batches_per_step(self) -> int:
        """Return how many micro-batches each rank has in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)


class _Collated(Dataset[Any]):
    """Micro-batches addressed by the numbers of their draws, which they carry as ``draw_index``.

    What could not be used is in ``bad_samples``.

    A user's mistake comes back in the batch's place: raised in a worker it would arrive as the text of a traceback.
    """

    def __init__(self, samples: Samples, order: Order) -> None:
        self.samples = samples
        self.order = order

    def __getitem__(self, draws: list[int]) -> dict[str, Any] | UserError:
        bad: list[BadSample] = []
        try:
            indices = [self.order[draw] for draw in draws]
            self.samples.expect(indices)
            samples = [
                {**self.samples.draw(index, draw, bad), "draw_index": draw}
                for index, draw in zip(indices, draws, strict=True)
            ]
            return {**default_collate(samples), "bad_samples": bad}
        except UserError as error:
            return error


class _MicroBatches(Sampler[list[int]]):
    def __init__(self, layout: BatchLayout, first_draw: int, last_draw: int | None) -> None:
        self.layout = layout
        self.first_draw = first_draw
        self.last_draw = last_draw

    def __iter__(self) -> Iterator[list[int]]:
        draw = self.first_draw
        while self.last_draw is None or draw < self.last_draw:
            for micro_batch in self.layout.micro_batches(draw):
                yield list(micro_batch)
            draw += self.layout.global_batch_size


def batches(
    samples: Samples,
    order: Order,
    layout: BatchLayout,
    first_draw: int = 0,
    last_draw: int | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[dict[str, Any]]:
    """Iterate over this rank's micro-batches.

    Args:
        first_draw: draws consumed so far by the run, a multiple of the global batch size.
        last_draw: where to stop; None never stops.
        num_workers: data loading processes.
        pin_memory: keep batches in memory that a GPU copies from while the host goes on.

    Yields:
        Collated samples with ``draw_index``, int64 [micro_batch], the draw numbers, and ``bad_samples``, a list of
        :class:`BadSample`: what could not be used, so that the next sample has taken its place.

    Raises:
        UserError: no sample can be read, or one does not fit the model.
    """
    loader = DataLoader(
        _Collated(samples, order),
        batch_size=None,
        sampler=_MicroBatches(layout, first_draw, last_draw),
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=2 if num_workers else None,
        worker_init_fn=lambda worker: stop_signals.heed_parent_alone(),
        generator=torch.Generator(),
    )
    for batch in _until_a_worker_ends(iter(loader)) if num_workers else loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _until_a_worker_ends(loaded: Iterator[Any]) -> Iterator[Any]:
    """Hand on what is loaded; the end of a connection to a worker is said as PyTorch says the end of a worker.

    So is the end of the thread that copies to pinned memory, which reads from that connection.
    """
    while True:
        try:
            batch = next(loaded)
        except StopIteration:
            return
        except (OSError, EOFError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "Pin memory thread" not in str(error):
                raise
            # PyTorch's handler would raise in the middle of the end.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            raise RuntimeError(f"DataLoader worker ended: {type(error).__name__} {error}".rstrip()) from error
        yield batch
