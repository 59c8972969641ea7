"""SiT (Ma et al., 2024): the original DiT's tensors, trained with stochastic interpolants; here as a rectified flow.

SiT's time runs from 0 (noise) to 1 (data) and goes into the features as it is; its velocity leads from noise to data; twice the
channels come out, of which the second half is not used. Rectified flow as in SD3 has timesteps from 1000 (noise) to 0 (data), and
a velocity from data to noise. With t = 1 - timestep / 1000 the one is the other with changed weights: cosines and sines of t are
linear combinations of those of timestep / 1000, and the velocity has the other sign.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rmoe_megatron.config.model import DiffusionConfig, Objective
from rmoe_megatron.conversion.facebook_dit import FacebookDiT
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.untrusted import shown
from rmoe_megatron.pretrained.architecture import ImportedArchitecture

TIMESTEP_SCALE = 1e-3
NAME = re.compile(r"(?<![A-Za-z])SiT(?![A-Za-z])", re.IGNORECASE)
# What the training's arguments have to say where they are there.
SUPPORTED = {"path_type": "Linear", "prediction": "velocity"}
_FIRST_LAYER = "timestep_embedder.linear_1.weight"
_LAST_LAYER = ("proj_out_2.weight", "proj_out_2.bias")


def looks_like_sit(path: Path, arguments: Mapping[str, object]) -> bool:
    """Whether a file's name, or the arguments of its training, say that it is SiT's; its tensors do not."""
    return NAME.search(path.stem) is not None or "path_type" in arguments


class SiT:
    """The weights of SiT as a rectified flow's, under diffusers' names.

    Args:
        source: the file; its tensors are changed as they are read.

    Raises:
        UserError: it was trained with another path or prediction.
    """

    def __init__(self, source: FacebookDiT) -> None:
        for name, expected in SUPPORTED.items():
            if (found := source.arguments.get(name, expected)) != expected:
                raise UserError(
                    f"{source.path} was trained with {name}={shown(found)}; supported is {expected} alone."
                )
        self.source = source
        self.shapes = {name: self._shape(name) for name in source.shapes}

    @property
    def architecture(self) -> ImportedArchitecture:
        """Return the architecture that the shapes tell, trained as a rectified flow without a shift."""
        model = replace(self.source.model, learned_sigma=False, timestep_scale=TIMESTEP_SCALE)
        return ImportedArchitecture(model, None, DiffusionConfig(objective=Objective.rectified_flow))

    def read(self, name: str) -> Tensor:
        """Return the tensor under a name of diffusers."""
        tensor = self.source.read(name)
        if name.endswith(_FIRST_LAYER):
            return _of_reversed_time(tensor)
        return -self._first_half(tensor) if name in _LAST_LAYER else tensor

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self.source.shapes[name]
        halved = self.source.model.learned_sigma and name in _LAST_LAYER
        return (shape[0] // 2, *shape[1:]) if halved else shape

    def _first_half(self, tensor: Tensor) -> Tensor:
        """Return what makes the first half of the channels of every pixel of a patch; rows are [P P 2C, ...]."""
        model = self.source.model
        if not model.learned_sigma:
            return tensor
        rows = tensor.unflatten(0, (model.patch_size**2, 2 * model.in_channels))
        return rows[:, : model.in_channels].flatten(0, 1)


def _of_reversed_time(weight: Tensor) -> Tensor:
    """Return the layer behind cosines and sines of s f_i that equals ``weight`` [H, 2 F] behind those of (1 - s) f_i.

    cos((1 - s) f) = cos f cos sf + sin f sin sf, and sin((1 - s) f) = sin f cos sf - cos f sin sf.
    """
    cosines, sines = weight.double().chunk(2, dim=1)
    count = cosines.shape[1]
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(count, dtype=torch.float64) / count)
    cos, sin = frequencies.cos(), frequencies.sin()
    turned = torch.cat((cosines * cos + sines * sin, cosines * sin - sines * cos), dim=1)
    return turned.to(weight.dtype)
