"""Text to image in diffusers with one text encoder; Megatron-Core is not needed.

Models with Stable Diffusion 3's three text encoders are exported for diffusers' own StableDiffusion3Pipeline.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion_3.pipeline_output import StableDiffusion3PipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rmoe_megatron.carried_code import CarriesCode
from rmoe_megatron.encoders.caption_encoder import TextEmbeddings, TextEncoder
from rmoe_megatron.encoders.pixel_codec import PixelCodec


class RecurrentSD3Pipeline(CarriesCode, DiffusionPipeline):
    """Rectified-flow sampling with one frozen text encoder and classifier-free guidance.

    Args:
        transformer: SD3Transformer2DModel or RecurrentSD3Transformer2DModel; predicts the velocity.
        text_length: tokens of text in the joint sequence.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: PixelCodec | AutoencoderKL,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text_length: int = 77,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(text_length=text_length)
        channels = getattr(vae.config, "block_out_channels", (1,))
        self.vae_scale_factor = 2 ** (len(channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def encode_prompt(self, prompts: list[str]) -> TextEmbeddings:
        """Encode prompts to token states [B, L, D] and pooled embeddings [B, D]."""
        encoder = TextEncoder(self.text_encoder, self.tokenizer, self.config.text_length)
        encoded = encoder.encode(prompts)
        device, dtype = self._execution_device, self.transformer.dtype
        return TextEmbeddings(encoded.hidden_states.to(device, dtype), encoded.pooled.to(device, dtype))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] = "",
        num_inference_steps: int = 25,
        guidance_scale: float = 2.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]
        | None = None,
    ) -> StableDiffusion3PipelineOutput | tuple[Any]:
        """Make images.

        Args:
            prompt: one or several prompts.
            negative_prompt: what unguided predictions are conditioned on; training drops captions to "".
            guidance_scale: 1 samples without guidance.
            guidance_interval: guide only where timestep / 1000 lies in it (Kynkäänniemi et al., 2024).
            generator: one, or one per image; with one per image an image does not depend on its batch.
            latents: initial noise [B, C, H, W]; drawn from ``generator`` if not given.
            output_type: ``pil``, ``np`` (float [B, H, W, C] in [0, 1]), ``pt`` or ``latent``.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        text = self.encode_prompt(prompts)
        negative_text = self.encode_prompt(negatives) if guidance_scale != 1.0 else None
        size = self.transformer.config.sample_size
        shape = (len(prompts), self.transformer.config.in_channels, size, size)
        device = self._execution_device
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for index, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            guided = guidance_interval[0] <= timestep / 1000 <= guidance_interval[1]
            velocity = self._velocity(
                latents, timestep, text, negative_text if guided else None, guidance_scale
            )
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, index, timestep, {"latents": latents}).get(
                    "latents", latents
                )
        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return StableDiffusion3PipelineOutput(images=images) if return_dict else (images,)

    def _velocity(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: TextEmbeddings,
        negative_text: TextEmbeddings | None,
        guidance: float,
    ) -> Tensor:
        """Predict the velocity float32 [B, C, H, W], guided if there is a negative text."""
        inputs, hidden_states, pooled = latents, text.hidden_states, text.pooled
        if negative_text is not None:
            inputs = latents.repeat(2, 1, 1, 1)
            hidden_states = torch.cat((hidden_states, negative_text.hidden_states))
            pooled = torch.cat((pooled, negative_text.pooled))
        velocity = self.transformer(
            hidden_states=inputs.to(self.transformer.dtype),
            encoder_hidden_states=hidden_states,
            pooled_projections=pooled,
            timestep=timestep.float().expand(inputs.shape[0]),
            return_dict=False,
        )[0].float()
        if negative_text is None:
            return velocity
        conditional, unconditional = velocity.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        shift = self.vae.config.shift_factor or 0.0
        unscaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + shift
        image = self.vae.decode(unscaled, return_dict=False)[0].float()
        return self.image_processor.postprocess(image, output_type=output_type)
