"""Micro-batches on their way to the device while the one before them is worked on."""

from collections.abc import Iterator

import torch

from rmoe_megatron.data.batch import Batch


def prefetched(batches: list[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on the device in float32; the next one is copied, on a stream of its own, while one is used.

    Args:
        batches: this rank's batches, in pinned memory where the device is a GPU.
    """
    stream = torch.cuda.Stream()

    def copied(batch: Batch) -> Batch:
        # Memory of batches that are done with is taken again for later ones: what still reads it has to end first.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            return batch.to(device)

    following = copied(batches[0])
    for number in range(len(batches)):
        torch.cuda.current_stream().wait_stream(stream)
        current = following
        if number + 1 < len(batches):
            following = copied(batches[number + 1])
        yield current
