"""A training step of one rank on tensors without values."""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.distributed import param_and_grad_buffer

from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.data.batch import Batch, ClassConditions, TextConditions
from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.engine.megatron.engine import MegatronEngine
from rmoe_megatron.engine.megatron.optimizer import create_state
from rmoe_megatron.engine.protocol import Engine
from rmoe_megatron.engine.registry import build_engine
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.planning.fake_ranks import fake_rank
from rmoe_megatron.planning.listening import Collective, Listener, Operation, Place
from rmoe_megatron.planning.places import followed
from rmoe_megatron.training.ema import ExponentialMovingAverage
from rmoe_megatron.training.fine_tuning import freeze

type Heard = tuple[Counter[Operation], Counter[Collective]]


@dataclass(frozen=True)
class RankUsage:
    """What one rank of a layout needs for a step; bytes are of tensors, without what an allocator rounds up or libraries keep.

    Attributes:
        parameters: bytes of weights and buffers.
        gradients: bytes of the buffers that gradients are summed in and that stay.
        averages: bytes of the moving average of the weights.
        optimizer: bytes of main weights and moments, and what else stays from step to step.
        activations: bytes that the fullest moment of a step has on top: activations, temporary tensors, the batch.
        operations: computations of a step, and how often each takes place.
        collectives: messages of a step, and how often each takes place.
        micro_batches: how many micro-batches a step has.
        at_peak: ``activations`` by where they were made.
    """

    rank: int
    parameters: int
    gradients: int
    averages: int
    optimizer: int
    activations: int
    operations: Counter[Operation]
    collectives: Counter[Collective]
    micro_batches: int
    at_peak: Counter[Place] = field(default_factory=Counter)

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        return self.parameters + self.gradients + self.averages + self.optimizer + self.activations


def dry_run(config: RunConfig, rank: int, world_size: int, imbalance: float = 1.0) -> RankUsage:
    """Build one rank of a run and let it take a step with everything that stays from step to step.

    Args:
        config: a valid configuration with a layout for ``world_size`` ranks.
        imbalance: how many times as many tokens as on average the experts of this rank get, where experts are spread over ranks.
    """
    with fake_rank(config, rank, world_size, imbalance) as device, Listener() as listener:
        chunks = build_chunks(config)
        if config.fine_tuning is not None:
            freeze(chunks, config.fine_tuning)
        null = _batch(config, 0, device).conditions.map(lambda all: all[:1])
        engine = build_engine(config, chunks, DiffusionLoss(config, config.seed, null))
        optimizer = config.optimizer
        averages = ExponentialMovingAverage(
            engine.parameters, optimizer.ema_decay, optimizer.ema_power, engine.main_weights
        )
        data_parallel = parallel_state.get_data_parallel_world_size()
        count = config.training.global_batch_size // (config.training.micro_batch_size * data_parallel)
        take = partial(_batches, config, device)
        step = _step_of_megatron if isinstance(engine, MegatronEngine) else _step_of_deepspeed
        with followed(chunks, listener):
            operations, collectives = step(engine, listener, take, count, partial(averages.update, 1))
        at_peak = listener.memory.at_peak()
        kept = listener.memory.peak - sum(at_peak.values())
        parameters = _bytes([*chunks.parameters(), *chunks.buffers(), *engine.parameters.values()])
        gradients = _bytes(_gradient_buffers(engine))
        averaged = _bytes(list(averages.averages.values()))
        return RankUsage(
            rank=rank,
            parameters=parameters,
            gradients=gradients,
            averages=averaged,
            optimizer=kept - parameters - gradients - averaged,
            activations=sum(at_peak.values()),
            operations=operations,
            collectives=collectives,
            micro_batches=count,
            at_peak=at_peak,
        )


def _step_of_megatron(
    engine: Any,
    listener: Listener,
    take: Callable[[int], list[Batch]],
    count: int,
    before_update: Callable[[], None],
) -> Heard:
    """Return what is heard of a step of ``count`` micro-batches, of which as many are taken as are under way at once.

    The interleaved schedule begins with up to two for each stage before the first comes back.
    """
    at_once = parallel_state.get_pipeline_model_parallel_world_size() * (
        2 if len(engine.model.wrapped) > 1 else 1
    )
    taken = min(count, at_once)
    finalize = engine.model.config.finalize_model_grads_func

    def reduce_gradients(*arguments: Any, **settings: Any) -> None:
        listener.is_updating = True  # the backward passes of the step are over
        finalize(*arguments, **settings)

    engine.model.config.finalize_model_grads_func = reduce_gradients
    create_state(engine.optimizer)  # which the first update of a run makes
    listener.begin()
    with _marked_data_parallelism(listener):
        engine.step(take(taken), before_update)

    def in_all(event: Operation | Collective, number: int) -> int:
        is_once = event.phase == "update" or getattr(event, "is_data_parallel", False)
        return number if is_once else number * count // taken

    return (
        Counter({each: in_all(each, number) for each, number in listener.operations.items()}),
        Counter({each: in_all(each, number) for each, number in listener.collectives.items()}),
    )


def _step_of_deepspeed(
    engine: Any,
    listener: Listener,
    take: Callable[[int], list[Batch]],
    count: int,
    before_update: Callable[[], None],
) -> Heard:
    """Return what is heard of a step of ``count`` micro-batches, of which the first and the last are taken: the others are like the first."""
    # In its first step ZeRO's third stage learns in which order layers are used.
    engine.step(take(min(count, 2)), before_update)
    gc.collect()
    first: Heard = Counter(), Counter()
    add_noise, begun = engine.loss.add_noise, 0

    def counted(batch: Batch) -> Any:
        """Remember what was heard of the first micro-batch when the second begins."""
        nonlocal first, begun
        begun += 1
        if begun == 2:
            first = listener.operations.copy(), listener.collectives.copy()
        return add_noise(batch)

    def update() -> None:
        listener.is_updating = True
        before_update()

    listener.begin()
    listener.is_data_parallel = True  # all that is sent but tokens, which go to their experts
    with mock.patch.object(engine.loss, "add_noise", counted):
        engine.step(take(min(count, 2)), update)
    more = max(0, count - 2)
    for operation, number in first[0].items():
        listener.operations[operation] += number * more
    for message, number in first[1].items():
        listener.collectives[message] += number * more
    return listener.operations, listener.collectives


@contextmanager
def _marked_data_parallelism(listener: Listener) -> Iterator[None]:
    """Let the listener know of messages that Megatron-Core's data parallelism sends, at whatever time it does."""

    def marked(send: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            listener.is_data_parallel = True
            try:
                return send(*arguments, **settings)
            finally:
                listener.is_data_parallel = False

        return call

    group = param_and_grad_buffer._ParamAndGradBucketGroup
    with (
        mock.patch.object(group, "start_grad_sync", marked(group.start_grad_sync)),
        mock.patch.object(group, "start_param_sync", marked(group.start_param_sync)),
    ):
        yield


def _gradient_buffers(engine: Engine) -> list[torch.Tensor]:
    if isinstance(engine, MegatronEngine):
        return [
            buffer.grad_data
            for chunk in engine.model.wrapped
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ]
    # Of DeepSpeed's optimizers: the first stage's in bf16, and the third's. The others free gradients with every update.
    optimizer: Any = engine.optimizer  # type: ignore[attr-defined]
    return [
        *getattr(optimizer, "fp32_groups_gradients_flat", []),
        *(
            [optimizer.grad_partitions_flat_buffer]
            if hasattr(optimizer, "grad_partitions_flat_buffer")
            else []
        ),
    ]


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of the storages of some tensors, each counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _batches(config: RunConfig, device: torch.device, count: int) -> list[Batch]:
    return [_batch(config, number, device) for number in range(count)]


def _batch(config: RunConfig, number: int, device: torch.device) -> Batch:
    """Return a micro-batch of the configuration's size; its values are never looked at."""
    model, samples = config.model, config.training.micro_batch_size
    conditions: Any
    if model.is_class_conditional:
        conditions = ClassConditions(torch.zeros(samples, dtype=torch.int64, device=device))
    else:
        conditions = TextConditions(
            torch.zeros(samples, model.text_length, model.text_hidden_size, device=device),
            torch.zeros(samples, model.pooled_size, device=device),
        )
    latents = torch.zeros(samples, model.in_channels, model.sample_size, model.sample_size, device=device)
    return Batch(latents, conditions, torch.arange(samples, device=device) + samples * number)
