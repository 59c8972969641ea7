"""Class label to image in diffusers, for DiTs that diffusers' own DiTPipeline cannot sample.

That one takes 1000 classes, DDPM's samplers and autoencoders without a shift for granted. This file and what it imports
need diffusers alone: an exported folder can carry them (``--remote-code``).
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from rmoe_megatron.carried_code import CarriesCode


class RecurrentDiTPipeline(CarriesCode, DiffusionPipeline):
    """Sampling with classifier-free guidance; of a learned variance the noise alone is used, as in DiTPipeline.

    Args:
        transformer: DiTTransformer2DModel or RecurrentDiTTransformer2DModel.
        vae: AutoencoderKL or what has its interface.
        scheduler: of DDPM or rectified flow, as the transformer was trained.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, transformer: ModelMixin, vae: ModelMixin, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        channels = getattr(vae.config, "block_out_channels", (1,))
        self.vae_scale_factor = 2 ** (len(channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]
        | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Make images.

        Args:
            class_labels: one per image.
            guidance_scale: 1 samples without guidance.
            guidance_interval: guide only where timestep / 1000 lies in it (Kynkäänniemi et al., 2024).
            generator: one, or one per image; with one per image an image does not depend on its batch.
            latents: initial noise [B, C, H, W]; drawn from ``generator`` if not given.
            output_type: ``pil``, ``np`` (float [B, H, W, C] in [0, 1]), ``pt`` or ``latent``.
        """
        config, device = self.transformer.config, self._execution_device
        labels = torch.tensor(class_labels, device=device)
        null = torch.full_like(labels, config.num_embeds_ada_norm)
        shape = (len(class_labels), config.in_channels, config.sample_size, config.sample_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for index, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            guided = guidance_scale != 1.0 and guidance_interval[0] <= timestep / 1000 <= guidance_interval[1]
            output = self._predict(latents, timestep, labels, null if guided else None, guidance_scale)
            latents = self.scheduler.step(output, timestep, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, index, timestep, {"latents": latents}).get(
                    "latents", latents
                )
        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(
        self, latents: Tensor, timestep: Tensor, labels: Tensor, null: Tensor | None, guidance: float
    ) -> Tensor:
        """Predict noise or velocity float32 [B, C, H, W], guided if there are null labels."""
        inputs = latents if null is None else latents.repeat(2, 1, 1, 1)
        output = self.transformer(
            inputs.to(self.transformer.dtype),
            timestep=timestep.float().expand(inputs.shape[0]),
            class_labels=labels if null is None else torch.cat((labels, null)),
            return_dict=False,
        )[0].float()
        output = output[:, : latents.shape[1]]
        if null is None:
            return output
        conditional, unconditional = output.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        unscaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + shift
        image = self.vae.decode(unscaled, return_dict=False)[0].float()
        return self.image_processor.postprocess(image, output_type=output_type)
