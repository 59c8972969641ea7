"""Text to image in diffusers with one text encoder; Megatron-Core is not needed.

Models with Stable Diffusion 3's three text encoders are exported for diffusers' own StableDiffusion3Pipeline.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.pipelines.stable_diffusion_3.pipeline_output import StableDiffusion3PipelineOutput
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rmoe_megatron.hf.caption_encoder import TextEncoder
from rmoe_megatron.hf.carried_code import CarriesCode
from rmoe_megatron.hf.denoising import DenoisingLoop, StepCallback
from rmoe_megatron.hf.pixel_codec import PixelCodec
from rmoe_megatron.hf.size_shift import ShiftsWithSize


class RecurrentSD3Pipeline(CarriesCode, ShiftsWithSize, DenoisingLoop, DiffusionPipeline):
    """Rectified-flow sampling with one frozen text encoder and classifier-free guidance.

    Args:
        transformer: SD3Transformer2DModel or RecurrentSD3Transformer2DModel; predicts the velocity.
        text_length: tokens of text in the joint sequence.
        shift: the shift of sigma for square latents of the side ``shift_base_size``; None leaves the sampler as it is.
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
        shift: float | None = None,
        shift_base_size: int | None = None,
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
        self.register_shift(shift, shift_base_size)
        self.build_image_processor()

    def encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        """Encode prompts to the transformer's arguments: token states [B, L, D] and pooled embeddings [B, D]."""
        encoder = TextEncoder(self.text_encoder, self.tokenizer, self.config.text_length)
        encoded = encoder.encode(prompts)
        device, dtype = self._execution_device, self.transformer.dtype
        return {
            "encoder_hidden_states": encoded.hidden_states.to(device, dtype),
            "pooled_projections": encoded.pooled.to(device, dtype),
        }

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] = "",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 2.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> StableDiffusion3PipelineOutput | tuple[Any]:
        """Make images.

        Args:
            prompt: one or several prompts.
            height: of the images in pixels, ``width`` likewise; None is the model's.
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
        final = self.denoise(
            self.encode_prompt(prompts),
            self.encode_prompt(negatives) if guidance_scale != 1.0 else {},
            num_inference_steps,
            guidance_scale,
            guidance_interval,
            generator,
            latents,
            callback_on_step_end,
            height,
            width,
        )
        images = self.decode(final, output_type)
        self.maybe_free_model_hooks()
        return StableDiffusion3PipelineOutput(images=images) if return_dict else (images,)
