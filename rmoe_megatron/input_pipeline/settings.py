"""What a run's configuration means for its data: sizes of pictures and latents, and what a sample has to be.

Megatron-Core is not imported: a job's submission asks the same.
"""

from typing import Annotated, TypedDict

from pydantic import Field, TypeAdapter, with_config

from rmoe_megatron.config.buckets import Bucket, build_buckets
from rmoe_megatron.config.captions import parse_captions
from rmoe_megatron.config.model import ModelConfig
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.config.sample_filter import SampleFilter
from rmoe_megatron.data.shards.bucketing import Bucketing
from rmoe_megatron.data.training_dataset import SampleFormat
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.untrusted import OPEN, read_json
from rmoe_megatron.pretrained.hub import present_folder
from rmoe_megatron.pretrained.model_files import autoencoder_parts


@with_config(OPEN)
class AutoencoderConfig(TypedDict):
    """What of an AutoencoderKL's ``config.json`` is needed: channels of its blocks, each but the last halves the side."""

    block_out_channels: Annotated[list[int], Field(min_length=1, max_length=16)]


AUTOENCODER = TypeAdapter(AutoencoderConfig)


def pixels_per_latent(autoencoder: str) -> int:
    """Return how many pixels of an image's side one of its latents' stands for.

    Raises:
        UserError: the autoencoder is not here, or its configuration cannot be read.
    """
    if autoencoder == "pixel":
        return 1
    folder = present_folder(autoencoder, "encoders.autoencoder", autoencoder_parts)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    described = read_json(folder / "config.json", AUTOENCODER)
    return 2 ** (len(described["block_out_channels"]) - 1)


def buckets_of(config: RunConfig, sample_size: int) -> tuple[Bucket, ...]:
    """Return the sizes of a run's pictures, in pixels: its buckets, or one square.

    Args:
        sample_size: side of the square latents.

    Raises:
        UserError: a bucket is malformed, or the autoencoder is not here, or its configuration cannot be read.
    """
    side = sample_size * pixels_per_latent(config.encoders.autoencoder)
    if config.data.buckets is None:
        return (Bucket(side, side),)
    return build_buckets(config.data.buckets, side)


def latent_sizes(config: RunConfig, sample_size: int) -> list[tuple[int, int]]:
    """Return height and width of the latents of each bucket."""
    scale = pixels_per_latent(config.encoders.autoencoder)
    return [(bucket.height // scale, bucket.width // scale) for bucket in buckets_of(config, sample_size)]


def sample_format(config: RunConfig, sample_size: int | None = None) -> SampleFormat:
    """Return what the model of a configuration takes of samples.

    Args:
        sample_size: side of the square latents; None is the model's.

    Raises:
        UserError: the autoencoder is not here, or its configuration cannot be read.
    """
    buckets = buckets_of(config, sample_size or config.model.sample_size)
    return SampleFormat(
        config.model.num_classes,
        Bucketing(buckets, config.data.upscale),
        config.data.buckets is not None,
        pixels_per_latent(config.encoders.autoencoder),
        parse_captions(config.data.captions),
        config.seed,
        SampleFilter(config.data.filter) if config.data.filter is not None else None,
        config.data.augment,
    )


def check_shapes(
    shapes: dict[str, tuple[int, ...]],
    model: ModelConfig,
    size: tuple[int, int],
    folder: str,
    precomputed: bool,
) -> None:
    """Check the shapes of a sample, encoded, against what a model takes.

    Args:
        size: height and width of the latents.
        folder: where the sample lies, for the message.
        precomputed: it lies there encoded.

    Raises:
        UserError: one differs.
    """
    expected: dict[str, tuple[int, ...]] = {"latents": (model.in_channels, *size)}
    if not model.is_class_conditional:
        expected["text_hidden_states"] = (model.text_length, model.text_hidden_size)
        expected["text_pooled"] = (model.pooled_size,)
    remedy = "precompute the data again with" if precomputed else "use data and encoders that fit"
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise UserError(
                f"{name} from {folder} has shape {shapes[name]} but the model of this configuration needs {shape}; "
                f"{remedy} this configuration."
            )
