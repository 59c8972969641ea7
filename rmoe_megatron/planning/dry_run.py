"""A training step of one rank on tensors without values."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.planning.fake_ranks import fake_rank
from rmoe_megatron.planning.listening import Collective, Listener, Operation
from rmoe_megatron.training.ema import ExponentialMovingAverage
from rmoe_megatron.training.fine_tuning import freeze


@dataclass(frozen=True)
class RankUsage:
    """What one rank of a layout needs for a step; bytes are of tensors, without what an allocator rounds up or libraries keep.

    Attributes:
        parameters: bytes of weights and buffers.
        gradients: bytes of the buffers that gradients are summed in.
        averages: bytes of the moving average of the weights.
        optimizer: bytes of main weights and moments, and what else stays from step to step.
        activations: bytes that the fullest moment of a step has on top: activations, temporary tensors, the batch.
        operations: computations of a step, and how often each takes place.
        collectives: messages of a step, and how often each takes place.
        micro_batches: how many micro-batches a step has.
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

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        return self.parameters + self.gradients + self.averages + self.optimizer + self.activations


def dry_run(config: RunConfig, rank: int, world_size: int) -> RankUsage:
    """Build one rank of a run and let it take a step with everything that stays from step to step.

    Args:
        config: a valid configuration with Megatron-Core's engine and a layout for ``world_size`` ranks.
    """
    with (
        fake_rank(config, rank, world_size) as device,
        Listener() as listener,
        _marked_data_parallelism(listener),
    ):
        chunks = build_chunks(config)
        if config.fine_tuning is not None:
            freeze(chunks, config.fine_tuning)
        loss = DiffusionLoss(
            config, config.seed, _batch(config, 0, device).conditions.map(lambda all: all[:1])
        )
        engine = MegatronEngine(config, chunks, loss)
        optimizer = config.optimizer
        averages = ExponentialMovingAverage(
            engine.parameters, optimizer.ema_decay, optimizer.ema_power, engine.main_weights
        )
        data_parallel = parallel_state.get_data_parallel_world_size()
        count = config.training.global_batch_size // (config.training.micro_batch_size * data_parallel)
        # As many as are under way at once: the others are like them.
        taken = min(count, config.parallel.pipeline_model_parallel_size)
        finalize = engine.model.config.finalize_model_grads_func

        def reduce_gradients(*arguments: Any, **settings: Any) -> None:
            listener.is_updating = True  # the backward passes of the step are over
            finalize(*arguments, **settings)

        engine.model.config.finalize_model_grads_func = reduce_gradients
        create_state(engine.optimizer)  # which the first update of a run makes
        listener.begin()
        batches = [_batch(config, number, device) for number in range(taken)]
        engine.step(batches, partial(averages.update, 1))
        del batches
        parameters = _bytes([*chunks.parameters(), *chunks.buffers()])
        gradients = _bytes(_gradient_buffers(engine))
        averaged = _bytes(list(averages.averages.values()))
        kept = listener.memory.live
        return RankUsage(
            rank=rank,
            parameters=parameters,
            gradients=gradients,
            averages=averaged,
            optimizer=kept - parameters - gradients - averaged,
            activations=listener.memory.peak - kept,
            operations=_repeated(listener.operations, count // taken),
            collectives=_repeated(listener.collectives, count // taken),
            micro_batches=count,
        )


def _repeated[Event: (Operation, Collective)](counted: Counter[Event], times: int) -> Counter[Event]:
    """Return what a step has if each micro-batch is met ``times`` as often; the update and data parallelism come once."""
    return Counter(
        {
            event: number
            * (1 if event.phase == "update" or getattr(event, "is_data_parallel", False) else times)
            for event, number in counted.items()
        }
    )


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


def _gradient_buffers(engine: MegatronEngine) -> list[torch.Tensor]:
    return [
        buffer.grad_data
        for chunk in engine.model.wrapped
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of the storages of some tensors, each counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


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
