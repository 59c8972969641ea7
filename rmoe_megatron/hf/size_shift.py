"""A sampler whose shift of sigma follows the size of the image, as in the training of a run with ``diffusion.shift_base_size``.

diffusers' own dynamic shifting is another function of the size. This file needs diffusers alone: an exported folder can carry it
(``--remote-code``).
"""

import math
from typing import Any


class ShiftsWithSize:
    """Mixin of a DiffusionPipeline with a ``scheduler`` of rectified flow.

    Its configuration has ``shift`` and ``shift_base_size``: the shift is that of square latents of this side, and grows with the
    square root of the number of latents (Esser et al., 2024, section 5.3.2). Where they are None, the sampler stays as it is.
    """

    scheduler: Any
    config: Any
    register_to_config: Any

    def register_shift(self, shift: float | None, shift_base_size: int | None) -> None:
        """Keep the shift in the configuration, from which ``model_index.json`` is written."""
        self.register_to_config(shift=shift, shift_base_size=shift_base_size)

    def fit_sampler(self, height: int, width: int) -> None:
        """Give the sampler the shift of latents of this size."""
        shift, base = self.config.shift, self.config.shift_base_size
        if shift is None or base is None:
            return
        key = "flow_shift" if self.scheduler.config.get("use_flow_sigmas", False) else "shift"
        scaled = shift * math.sqrt(height * width) / base
        if key in self.scheduler.config and self.scheduler.config[key] != scaled:
            self.scheduler = type(self.scheduler).from_config(self.scheduler.config, **{key: scaled})
