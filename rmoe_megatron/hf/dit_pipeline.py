"""Class label to image in diffusers, for DiTs that diffusers' own DiTPipeline cannot sample.

That one takes 1000 classes, DDPM's samplers and autoencoders without a shift for granted. This file and what it imports
need diffusers alone: an exported folder can carry them (``--remote-code``).
"""

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from torch import Tensor

from rmoe_megatron.hf.carried_code import CarriesCode
from rmoe_megatron.hf.denoising import DenoisingLoop, StepCallback
from rmoe_megatron.hf.size_shift import ShiftsWithSize


class RecurrentDiTPipeline(CarriesCode, ShiftsWithSize, DenoisingLoop, DiffusionPipeline):
    """Sampling with classifier-free guidance; of a learned variance the noise alone is used, as in DiTPipeline.

    Args:
        transformer: DiTTransformer2DModel or RecurrentDiTTransformer2DModel.
        vae: AutoencoderKL or what has its interface.
        scheduler: of DDPM or rectified flow, as the transformer was trained.
        shift: the shift of sigma for square latents of the side ``shift_base_size``; None leaves the sampler as it is.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: ModelMixin,
        vae: ModelMixin,
        scheduler: SchedulerMixin,
        shift: float | None = None,
        shift_base_size: int | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_shift(shift, shift_base_size)
        self.build_image_processor()

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
        callback_on_step_end: StepCallback | None = None,
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
        labels = torch.tensor(class_labels, device=self._execution_device)
        null = torch.full_like(labels, self.transformer.config.num_embeds_ada_norm)
        final = self.denoise(
            {"class_labels": labels},
            {"class_labels": null},
            num_inference_steps,
            guidance_scale,
            guidance_interval,
            generator,
            latents,
            callback_on_step_end,
        )
        images = self.decode(final, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
