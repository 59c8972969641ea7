"""The sampling loop of this package's pipelines: any sampler of diffusers, guidance inside an interval.

This file needs diffusers alone: an exported folder can carry it (``--remote-code``).
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

StepCallback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


class DenoisingLoop:
    """Mixin of a DiffusionPipeline with components ``transformer``, ``scheduler`` and ``vae``, and of ShiftsWithSize.

    The transformer predicts velocity or noise, as the scheduler expects; of a learned variance the noise alone is used.
    """

    transformer: Any
    scheduler: Any
    vae: Any
    image_processor: VaeImageProcessor
    progress_bar: Callable[[Any], Any]
    fit_sampler: Callable[[int, int], None]
    _execution_device: torch.device

    def build_image_processor(self) -> None:
        """Make what turns decoded tensors into images; called when the components are there."""
        channels = getattr(self.vae.config, "block_out_channels", (1,))
        self.vae_scale_factor = 2 ** (len(channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    def denoise(
        self,
        conditions: dict[str, Tensor],
        null_conditions: dict[str, Tensor],
        num_inference_steps: int,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        callback_on_step_end: StepCallback | None,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """Return latents float32 [B, C, H, W].

        Args:
            conditions: the transformer's arguments, each [B, ...]; ``null_conditions`` those of nothing.
            guidance_scale: 1 samples without guidance.
            guidance_interval: guide only where timestep / 1000 lies in it (Kynkäänniemi et al., 2024).
            latents: initial noise [B, C, H, W]; drawn from ``generator`` if not given.
            height: of the image in pixels, ``width`` likewise; None is the model's.

        Raises:
            ValueError: height or width is no multiple of the pixels of a patch.
        """
        config, device = self.transformer.config, self._execution_device
        if latents is None:
            count = next(iter(conditions.values())).shape[0]
            sides = (self.latent_side(height), self.latent_side(width))
            shape = (count, config.in_channels, *sides)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        self.fit_sampler(*latents.shape[2:])
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for index, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            guided = guidance_scale != 1.0 and guidance_interval[0] <= timestep / 1000 <= guidance_interval[1]
            null = null_conditions if guided else None
            output = self.predict(latents, timestep, conditions, null, guidance_scale)
            latents = self.scheduler.step(output, timestep, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                outputs = callback_on_step_end(self, index, timestep, {"latents": latents})
                latents = outputs.get("latents", latents)
        return latents

    def latent_side(self, pixels: int | None) -> int:
        """Return height or width of the latents of an image; None is the model's."""
        config = self.transformer.config
        side, odd = divmod(
            pixels if pixels is not None else config.sample_size * self.vae_scale_factor,
            self.vae_scale_factor,
        )
        if odd or side % config.patch_size or side <= 0:
            unit = self.vae_scale_factor * config.patch_size
            raise ValueError(f"height and width are {pixels} pixels; they must be multiples of {unit}.")
        return side

    def predict(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditions: dict[str, Tensor],
        null_conditions: dict[str, Tensor] | None,
        guidance: float,
    ) -> Tensor:
        """Predict velocity or noise float32 [B, C, H, W], guided if there are null conditions."""
        inputs = latents
        if null_conditions is not None:
            inputs = latents.repeat(2, 1, 1, 1)
            conditions = {
                name: torch.cat((values, null_conditions[name])) for name, values in conditions.items()
            }
        output = self.transformer(
            hidden_states=inputs.to(self.transformer.dtype),
            timestep=timestep.float().expand(inputs.shape[0]),
            **conditions,
            return_dict=False,
        )[0].float()
        output = output[:, : latents.shape[1]]
        if null_conditions is None:
            return output
        conditional, unconditional = output.chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    def decode(self, latents: Tensor, output_type: str) -> Any:
        """Return images of ``output_type``: pil, np (float [B, H, W, C] in [0, 1]), pt, or the latents themselves."""
        if output_type == "latent":
            return latents
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        unscaled = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + shift
        image = self.vae.decode(unscaled, return_dict=False)[0].float()
        return self.image_processor.postprocess(image, output_type=output_type)
