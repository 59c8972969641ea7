"""Any ranks, micro-batches, workers and restarts draw the same samples in the same order, each once in an epoch."""

from itertools import islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rmoe_megatron.data.loader import BatchLayout, batches
from rmoe_megatron.data.order import GlobalOrder
from rmoe_megatron.data.training_dataset import SampleFormat, TrainingDataset
from tests.data.test_shards import png
from tests.support.runs import write_shard


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Sets of several sizes, in shards of 5; a caption is the number of its sample."""
    made = {}
    for size in (3, 11, 24):
        made[size] = tmp_path_factory.mktemp(f"of_{size}")
        for shard, first in enumerate(range(0, size, 5)):
            numbers = range(first, min(first + 5, size))
            samples = [{"png": png(number), "txt": str(number).encode()} for number in numbers]
            write_shard(made[size] / f"{shard}.tar", samples)
    return made


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_order_is_the_run_s_alone(folders: dict[int, Path], data: st.DataObject) -> None:
    size = data.draw(st.sampled_from(sorted(folders)), "size")
    global_batch = data.draw(st.sampled_from([4, 8, 12]), "global batch")
    order = GlobalOrder(size, shuffle=True, seed=data.draw(st.integers(0, 99), "seed"))
    steps = -(-3 * size // global_batch)  # three epochs, and the rest of a step
    drawn: list[str] = []
    while len(drawn) < steps * global_batch:
        # A start under another layout, which gets some steps far.
        ranks = data.draw(st.sampled_from([1, 2, 4]), "ranks")
        per_rank = global_batch // ranks
        micro_batch = data.draw(
            st.sampled_from([each for each in range(1, per_rank + 1) if per_rank % each == 0]), "micro batch"
        )
        here = data.draw(st.integers(1, steps - len(drawn) // global_batch), "steps")
        workers = data.draw(st.sampled_from([0] * 19 + [2]), "workers")
        per_step = per_rank // micro_batch
        loaded = []
        for rank in range(ranks):
            dataset = TrainingDataset(folders[size], SampleFormat())
            layout = BatchLayout(global_batch, micro_batch, rank, ranks)
            loader = batches(dataset, order, layout, first_draw=len(drawn), num_workers=workers)
            loaded.append([batch["caption"] for batch in islice(loader, here * per_step)])
        for step in range(here):
            for place in range(per_step):  # the first micro-batches of all ranks, then the second ones
                drawn += [key for of_rank in loaded for key in of_rank[step * per_step + place]]
    assert drawn == [str(order[draw]) for draw in range(len(drawn))]
    for epoch in range(3):
        assert sorted(map(int, drawn[epoch * size : (epoch + 1) * size])) == list(range(size))
