"""What Qwen3-VL sees of a picture: transformers' processor for torchvision, to the bit, where torchvision is not installed.

transformers has the processor twice. The one that published scores were made with resizes by torchvision, whose whole numbers differ from
Pillow's in the last place wherever a side is no multiple of 32 pixels. torchvision hands that resize on to torch, which is here anyway.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

MODES = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers, as preprocessor_config.json has them


class QwenPixels(Qwen2VLImageProcessorPil):
    """Qwen2-VL's processor with the resize of torch and the normalisation in one step."""

    def resize(
        self, image: NDArray[np.uint8], size: Any, resample: Any, factor: int, **unused: Any
    ) -> NDArray[np.uint8]:
        """Return a picture uint8 [C, H, W] whose sides are multiples of ``factor``."""
        height, width = smart_resize(*image.shape[-2:], factor, size.shortest_edge, size.longest_edge)
        if image.shape[-2:] == (height, width):
            return image
        pixels = torch.from_numpy(np.ascontiguousarray(image))[None]
        resized = F.interpolate(
            pixels, size=(height, width), mode=MODES[int(resample)], align_corners=False, antialias=True
        )
        return resized[0].numpy()

    def rescale(self, image: NDArray[np.uint8], scale: float, **unused: Any) -> NDArray[np.uint8]:
        """Return the picture as it is: ``normalize`` does both."""
        return image

    def normalize(
        self, image: NDArray[np.uint8], mean: list[float], std: list[float], **unused: Any
    ) -> NDArray[np.float32]:
        """Return the picture normalised, float32 [C, H, W]."""
        means, deviations = (
            torch.tensor(each).mul(1 / self.rescale_factor).view(-1, 1, 1) for each in (mean, std)
        )
        return torch.from_numpy(image).float().sub(means).div(deviations).numpy()
