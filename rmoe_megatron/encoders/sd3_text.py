"""Stable Diffusion 3's three text encoders: CLIP-L, CLIP-G and T5-XXL (Esser et al., 2024, section 4)."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
)

from rmoe_megatron.errors import UserError
from rmoe_megatron.hf.caption_encoder import TextEmbeddings
from rmoe_megatron.pretrained.loading import (
    load_text_encoder_config,
    load_text_encoder_folder,
    load_tokenizer,
)

CLIP_LENGTH = 77
# name -> (number of the component in a diffusers pipeline's folder, model class, configuration class)
ENCODERS = {
    "clip_l": ("", CLIPTextModelWithProjection, CLIPTextConfig),
    "clip_g": ("_2", CLIPTextModelWithProjection, CLIPTextConfig),
    "t5": ("_3", T5EncoderModel, T5Config),
}


@dataclass
class Encoder:
    """One of the three; ``model`` is None where it is dropped."""

    name: str
    width: int
    pooled_width: int
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None

    def tokenize(self, captions: list[str], length: int) -> Tensor:
        """Return token numbers [B, length], padded and cut."""
        assert self.tokenizer is not None
        assert self.model is not None
        tokens = self.tokenizer(
            captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return tokens["input_ids"].to(self.model.device)


class SD3TextEncoder:
    """CLIP-L's and CLIP-G's token states side by side, widened with zeros to T5's, followed by T5's.

    CLIP's are those before the last layer; the pooled embeddings are CLIP's projections side by side. A dropped encoder
    gives zeros. Equal to diffusers' ``StableDiffusion3Pipeline.encode_prompt``.

    Args:
        text_length: CLIP's 77 tokens and T5's together.
    """

    def __init__(
        self, clip_l: Encoder, clip_g: Encoder, t5: Encoder, text_length: int, device: torch.device
    ) -> None:
        self.clips, self.t5 = (clip_l, clip_g), t5
        self.t5_length = text_length - CLIP_LENGTH
        self.device = device

    @torch.no_grad()
    def encode(self, captions: list[str]) -> TextEmbeddings:
        """Encode captions to states [B, 77 + T5 length, T5 width] and pooled [B, CLIP-L + CLIP-G width]."""
        states, pooled = zip(*(self._encode_clip(clip, captions) for clip in self.clips), strict=True)
        clip_states = torch.cat(states, dim=-1)
        clip_states = F.pad(clip_states, (0, self.t5.width - clip_states.shape[-1]))
        hidden_states = torch.cat((clip_states, self._encode_t5(captions)), dim=1)
        return TextEmbeddings(hidden_states, torch.cat(pooled, dim=-1))

    def _encode_clip(self, clip: Encoder, captions: list[str]) -> tuple[Tensor, Tensor]:
        if clip.model is None:
            zeros = torch.zeros(len(captions), CLIP_LENGTH + 1, clip.width, device=self.device)
            return zeros[:, 1:], zeros[:, 0, : clip.pooled_width]
        output = clip.model(clip.tokenize(captions, CLIP_LENGTH), output_hidden_states=True)
        return output.hidden_states[-2].float(), output.text_embeds.float()

    def _encode_t5(self, captions: list[str]) -> Tensor:
        if self.t5.model is None:
            return torch.zeros(len(captions), self.t5_length, self.t5.width, device=self.device)
        return self.t5.model(self.t5.tokenize(captions, self.t5_length)).last_hidden_state.float()

    def components(self) -> dict[str, object]:
        """Return encoders and tokenizers under the names of StableDiffusion3Pipeline's arguments."""
        named: dict[str, object] = {}
        for encoder in (*self.clips, self.t5):
            number = ENCODERS[encoder.name][0]
            named[f"text_encoder{number}"] = encoder.model
            named[f"tokenizer{number}"] = encoder.tokenizer
        return named


def load_sd3_text_encoders(
    folder: Path,
    dropped: list[str],
    text_length: int,
    device: torch.device,
    text_hidden_size: int | None = None,
) -> SD3TextEncoder:
    """Load the text encoders of a diffusers Stable Diffusion 3 folder in the precision of their files.

    Args:
        text_hidden_size: T5's width, for a pipeline without T5, which is then among ``dropped``.

    Raises:
        UserError: a part of the folder is missing or malformed, or ``text_length`` leaves T5 no token.
    """
    require_room_for_t5(text_length)
    loaded = {name: _load(folder, name, name in dropped, device, text_hidden_size) for name in ENCODERS}
    return SD3TextEncoder(**loaded, text_length=text_length, device=device)


def require_room_for_t5(text_length: int) -> None:
    """Check that a text has tokens beside CLIP's.

    Raises:
        UserError: it has none.
    """
    if text_length <= CLIP_LENGTH:
        raise UserError(
            f"model.text_length is {text_length}, but SD3's text has {CLIP_LENGTH} tokens of CLIP and then T5's; "
            "diffusers' default is 333."
        )


def _load(folder: Path, name: str, dropped: bool, device: torch.device, t5_width: int | None) -> Encoder:
    number, model_class, config_class = ENCODERS[name]
    path = folder / f"text_encoder{number}"
    if name == "t5" and not path.is_dir():
        if dropped and t5_width is not None:
            return Encoder(name, t5_width, 0, None, None)
        raise UserError(
            f"{folder} is a pipeline without text_encoder_3 (t5); use it with encoders.dropped=[t5]."
        )
    if not (path / "config.json").exists():
        raise UserError(
            f"{folder} has no text_encoder{number} ({name}); its config.json is needed even when "
            f"encoders.dropped names {name}."
        )
    config = load_text_encoder_config(path, config_class)
    is_clip = config_class is CLIPTextConfig
    width = config.hidden_size if is_clip else config.d_model
    pooled_width = config.projection_dim if is_clip else 0
    if dropped:
        return Encoder(name, width, pooled_width, None, None)
    tokenizer = load_tokenizer(folder / f"tokenizer{number}")
    model = load_text_encoder_folder(path, model_class, "auto")
    return Encoder(name, width, pooled_width, model.to(device), tokenizer)
