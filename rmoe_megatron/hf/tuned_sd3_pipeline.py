"""Stable Diffusion 3's pipeline with what a run trained otherwise: the length of its text, encoders it left out, a shift by size.

diffusers' own has no place for these in a folder. This file and what it imports need diffusers alone: an exported folder can carry
them (``--remote-code``).
"""

from typing import Any

from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin, StableDiffusion3Pipeline
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rmoe_megatron.hf.carried_code import CarriesCode
from rmoe_megatron.hf.pixel_codec import PixelCodec
from rmoe_megatron.hf.size_shift import ShiftsWithSize

CLIP_LENGTH = 77


class TunedSD3Pipeline(CarriesCode, ShiftsWithSize, StableDiffusion3Pipeline):
    """StableDiffusion3Pipeline with settings of a run.

    Args:
        text_length: tokens of text in the joint sequence, CLIP's 77 and T5's; ``max_sequence_length`` of a call is not looked at.
        dropped: of ``clip_l``, ``clip_g`` and ``t5`` those that give zeros, with a space between them; T5 need not be there then.
            No list: diffusers takes every list in ``model_index.json`` for a component.
        shift: the shift of sigma for square latents of the side ``shift_base_size``; None leaves the sampler as it is.
    """

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: PixelCodec | AutoencoderKL,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder_2: PreTrainedModel,
        tokenizer_2: PreTrainedTokenizerBase,
        text_encoder_3: PreTrainedModel | None,
        tokenizer_3: PreTrainedTokenizerBase | None,
        image_encoder: PreTrainedModel | None = None,
        feature_extractor: Any | None = None,
        text_length: int = 333,
        dropped: str = "",
        shift: float | None = None,
        shift_base_size: int | None = None,
    ) -> None:
        super().__init__(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(text_length=text_length, dropped=dropped)
        self.register_shift(shift, shift_base_size)

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """Encode prompts; see diffusers' StableDiffusion3Pipeline. Dropped encoders give zeros."""
        kwargs["max_sequence_length"] = self.config.text_length - CLIP_LENGTH
        states, negative_states, pooled, negative_pooled = super().encode_prompt(*args, **kwargs)
        return (
            self._without_dropped(states),
            self._without_dropped(negative_states),
            self._without_dropped_pooled(pooled),
            self._without_dropped_pooled(negative_pooled),
        )

    def _without_dropped(self, states: Tensor | None) -> Tensor | None:
        """Return token states [B, L, D] with zeros where dropped encoders stand: CLIP-L's columns, CLIP-G's beside them, T5's rows."""
        if states is None or not self.config.dropped:
            return states
        first = self.text_encoder.config.hidden_size
        second = first + self.text_encoder_2.config.hidden_size
        states = states.clone()
        if "clip_l" in self.config.dropped.split():
            states[:, :CLIP_LENGTH, :first] = 0
        if "clip_g" in self.config.dropped.split():
            states[:, :CLIP_LENGTH, first:second] = 0
        if "t5" in self.config.dropped.split():
            states[:, CLIP_LENGTH:] = 0
        return states

    def _without_dropped_pooled(self, pooled: Tensor | None) -> Tensor | None:
        """Return pooled embeddings [B, P], CLIP-L's before CLIP-G's, with zeros where dropped encoders stand."""
        if pooled is None or not self.config.dropped:
            return pooled
        first = self.text_encoder.config.projection_dim
        pooled = pooled.clone()
        if "clip_l" in self.config.dropped.split():
            pooled[:, :first] = 0
        if "clip_g" in self.config.dropped.split():
            pooled[:, first:] = 0
        return pooled

    def prepare_latents(
        self, batch_size: int, channels: int, height: int, width: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the initial noise; see diffusers' StableDiffusion3Pipeline. The sampler gets the shift of its size."""
        latents = super().prepare_latents(batch_size, channels, height, width, *args, **kwargs)
        self.fit_sampler(*latents.shape[2:])
        return latents
