"""What a run asks of the storage beside it: samples to read, checkpoints to write."""

from dataclasses import dataclass, replace

from rmoe_megatron.config.model import Architecture
from rmoe_megatron.config.run import Latents, ParallelConfig, RunConfig
from rmoe_megatron.distributed.device import PARAMS_DTYPE
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.planning.fake_ranks import fake_rank
from rmoe_megatron.training.fine_tuning import freeze

# Bytes of a stored number: precomputed latents and embeddings have 16 bits.
STORED = 2


@dataclass(frozen=True)
class Storage:
    """What a run reads and writes.

    Attributes:
        sample: bytes of a precomputed sample; None where pictures are stored, whose size is not known.
        checkpoint: bytes of a checkpoint.
    """

    sample: int | None
    checkpoint: int


def storage_of(config: RunConfig) -> Storage:
    """Return what a run with a precision other than ``auto`` reads and writes."""
    return Storage(sample_bytes(config), checkpoint_bytes(config))


def sample_bytes(config: RunConfig) -> int | None:
    """Return the bytes of a precomputed sample without what a tar adds; None where pictures are stored."""
    model, latents = config.model, config.data.precompute.latents
    if latents is Latents.none:
        return None
    values = model.in_channels * model.sample_size**2 * (2 if latents is Latents.distribution else 1)
    if model.architecture is not Architecture.dit:
        values += model.text_length * model.text_hidden_size + model.pooled_size
    return STORED * values


def checkpoint_bytes(config: RunConfig) -> int:
    """Return the bytes of a checkpoint: of every trained parameter itself, and in float32 its main weight, two moments and average."""
    with fake_rank(replace(config, parallel=ParallelConfig()), 0, 1):
        chunks = build_chunks(replace(config, parallel=ParallelConfig()))
        if config.fine_tuning is not None:
            freeze(chunks, config.fine_tuning)
        trained = sum(each.numel() for each in chunks.parameters() if each.requires_grad)
    return trained * (PARAMS_DTYPE[config.precision].itemsize + 4 * 4)
