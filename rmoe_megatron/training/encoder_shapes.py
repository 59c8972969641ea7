"""What the frozen encoders of a run give, as their configuration files say it, against what the model takes; nothing is loaded."""

from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.encoders.minilm import minilm_folder
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.untrusted import read_json
from rmoe_megatron.pretrained.hub import present_folder
from rmoe_megatron.pretrained.model_files import MODEL_INDEX, autoencoder_parts, text_encoder_parts

MINILM_WIDTH = 384
CLIP_LENGTH = 77  # tokens of the CLIPs of Stable Diffusion 3, before those of T5
_OBJECT = TypeAdapter(dict[str, Any])


def check_encoders_fit(config: RunConfig) -> None:
    """Check that latents and text states of a run's encoders have the shapes that its model takes.

    Raises:
        UserError: an encoder is not here, a file of it is malformed, or a shape differs; names the keys.
    """
    channels = latent_channels(config.encoders.autoencoder)
    if channels is not None and channels != config.model.in_channels:
        raise UserError(
            f"encoders.autoencoder {config.encoders.autoencoder} gives latents of {channels} channels, but model.in_channels is "
            f"{config.model.in_channels}; name another autoencoder, or set model.in_channels={channels}."
        )
    if config.model.is_class_conditional:
        return
    for key, width in text_widths(config).items():
        asked = getattr(config.model, key)
        if width is not None and width != asked:
            raise UserError(
                f"encoders.text_encoder {config.encoders.text_encoder} needs model.{key}={width}, but it is {asked}; name another "
                "encoder, or change the model."
            )


def latent_channels(autoencoder: str) -> int | None:
    """Return the channels of an autoencoder's latents, None where its configuration does not say them.

    Raises:
        UserError: it is not here.
    """
    if autoencoder == "pixel":
        return 3
    folder = present_folder(autoencoder, "encoders.autoencoder", autoencoder_parts)
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    return _whole(read_json(folder / "config.json", _OBJECT), "latent_channels")


def text_widths(config: RunConfig) -> dict[str, int | None]:
    """Return ``text_hidden_size`` and ``pooled_size`` of the text encoder, None where its files do not say them.

    Raises:
        UserError: it is not here, or leaves no token for T5.
    """
    name, dropped = config.encoders.text_encoder, config.encoders.dropped
    if name == "minilm":
        minilm_folder()
        return {"text_hidden_size": MINILM_WIDTH, "pooled_size": MINILM_WIDTH}
    folder = present_folder(name, "encoders.text_encoder", partial(text_encoder_parts, dropped=dropped))
    if (folder / "text_encoder_2").is_dir():
        return _sd3_widths(config, folder)
    part = folder / "text_encoder" if (folder / MODEL_INDEX).exists() else folder
    described = read_json(part / "config.json", _OBJECT)
    width = _whole(described, "hidden_size") or _whole(described, "d_model")
    return {"text_hidden_size": width, "pooled_size": width}


def _sd3_widths(config: RunConfig, folder: Path) -> dict[str, int | None]:
    if config.model.text_length <= CLIP_LENGTH:
        raise UserError(
            f"model.text_length is {config.model.text_length}, but SD3's text has {CLIP_LENGTH} tokens of CLIP and then T5's; diffusers' "
            "default is 333."
        )
    clips = [read_json(folder / f"text_encoder{end}" / "config.json", _OBJECT) for end in ("", "_2")]
    pooled = [_whole(clip, "projection_dim") for clip in clips]
    t5 = folder / "text_encoder_3" / "config.json"
    width = _whole(read_json(t5, _OBJECT), "d_model") if t5.is_file() else None  # the model's, without T5
    return {
        "text_hidden_size": width,
        "pooled_size": sum(each or 0 for each in pooled) if all(pooled) else None,
    }


def _whole(described: dict[str, Any], key: str) -> int | None:
    value = described.get(key)
    return value if isinstance(value, int) else None
