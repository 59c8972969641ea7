"""Text to image in diffusers with a recurrent transformer; Megatron-Core is not needed."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion_3.pipeline_output import StableDiffusion3PipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rmoe_megatron.config.schema import Prediction
from rmoe_megatron.diffusion.rectified_flow import to_velocity
from rmoe_megatron.encoders.autoencoder import PixelCodec
from rmoe_megatron.encoders.text import TextEmbeddings, TextEncoder
from rmoe_megatron.hf.transformer import RecurrentSD3Transformer2DModel


class RecurrentSD3Pipeline(DiffusionPipeline):
    """Rectified-flow sampling with one frozen text encoder and classifier-free guidance.

    Args:
        text_length: tokens of text in the joint sequence.
        prediction: what the transformer predicts, ``velocity`` or ``sample``.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: RecurrentSD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: PixelCodec | AutoencoderKL,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text_length: int = 77,
        prediction: str = "velocity",
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
        self.register_to_config(text_length=text_length, prediction=prediction)
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
            generator: one, or one per image; with one per image an image does not depend on its batch.
            latents: initial noise [B, C, H, W]; drawn from ``generator`` if not given.
            output_type: ``pil``, ``np`` (float [B, H, W, C] in [0, 1]), ``pt`` or ``latent``.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        guided = guidance_scale != 1.0
        text = self.encode_prompt(prompts + negatives if guided else prompts)
        size = self.transformer.config.sample_size
        shape = (len(prompts), self.transformer.config.in_channels, size, size)
        device = self._execution_device
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for index, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            velocity = self._velocity(latents, timestep, text, guidance_scale if guided else None)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, index, timestep, {"latents": latents}).get(
                    "latents", latents
                )
        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return StableDiffusion3PipelineOutput(images=images) if return_dict else (images,)

    def _velocity(
        self, latents: Tensor, timestep: Tensor, text: TextEmbeddings, guidance: float | None
    ) -> Tensor:
        """Predict the (guided) velocity float32 [B, C, H, W]; the second half of ``text`` is unconditional."""
        inputs = latents if guidance is None else latents.repeat(2, 1, 1, 1)
        timesteps = timestep.expand(inputs.shape[0])
        output = self.transformer(
            hidden_states=inputs.to(self.transformer.dtype),
            encoder_hidden_states=text.hidden_states,
            pooled_projections=text.pooled,
            timestep=timesteps,
            return_dict=False,
        )[0]
        predicted = to_velocity(Prediction[self.config.prediction], output, inputs, timesteps)
        if guidance is None:
            return predicted
        conditional, unconditional = predicted.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        unscaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + self.vae.config.shift_factor
        image = self.vae.decode(unscaled, return_dict=False)[0].float()
        return self.image_processor.postprocess(image, output_type=output_type)
