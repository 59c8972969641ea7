"""In which order micro-batches go to the device, and who waits for whom."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from rmoe_megatron.data.batch import Batch
from rmoe_megatron.distributed.megatron_on_cpu import use_cpu
from rmoe_megatron.engine.prefetching import prefetched
from tests.model.test_compile import make_batch


class Stream:
    """Writes down what is asked of it."""

    def __init__(self, name: str, done: list[str]) -> None:
        self.name, self.done = name, done

    def wait_stream(self, other: "Stream") -> None:
        self.done.append(f"{self.name} waits for {other.name}")


def test_the_next_batch_is_copied_while_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    compute, side = Stream("compute", done), Stream("side", done)

    @contextmanager
    def stream(stream: Stream) -> Iterator[None]:
        done.append(f"copy on {stream.name}")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: compute)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    batches = [make_batch(number) for number in range(3)]
    for batch, expected in zip(prefetched(batches, torch.device("cpu")), batches, strict=True):
        done.append("use")
        assert torch.equal(batch.latents, expected.latents)
        assert torch.equal(batch.draw_index, expected.draw_index)

    def places(event: str) -> list[int]:
        return [place for place, each in enumerate(done) if each == event]

    copies, uses = places("copy on side"), places("use")
    assert len(copies) == len(uses) == 3
    for number, use in enumerate(uses):
        # A batch is used only after its own copy: computing has waited for the copies after that one was asked for, ...
        assert any(copies[number] < wait < use for wait in places("compute waits for side"))
        # ... and the next copy is under way by then, but no other: two batches are on the device at a time.
        assert [copy < use for copy in copies] == [other <= number + 1 for other in range(3)]
    for number, copy in enumerate(copies):
        # What a copy writes to may have been read by what was computed before, which it waits for.
        previous = copies[number - 1] if number else -1
        assert any(previous < wait < copy for wait in places("side waits for compute"))


def test_what_is_stored_in_half_is_float32_on_the_device() -> None:
    use_cpu()
    half = make_batch(0).latents.half()
    (batch,) = prefetched([Batch(half, make_batch(0).conditions, torch.arange(2))], torch.device("cpu"))
    assert torch.equal(batch.latents, half.float())
