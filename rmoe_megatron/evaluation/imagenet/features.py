"""Features of the Inception network that ADM's evaluation uses, through torch-fidelity's conversion of its TensorFlow weights."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rmoe_megatron.files.foreign_errors import refusal

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity publishes them
WEIGHTS_SHA256 = "6726825d"  # the first digits, which their name says
SPATIAL_CHANNELS = 7  # of the first convolution of the block that TensorFlow calls mixed_6
POOL, CLASSES = 2048, 1008


@dataclass(frozen=True)
class Features:
    """Of a batch: pool [N, 2048], spatial [N, 7 * 17 * 17] and probabilities of classes [N, 1008], float32."""

    pool: NDArray[np.float32]
    spatial: NDArray[np.float32]
    probabilities: NDArray[np.float32]


class Inception:
    """torch-fidelity's Inception v3 with the TensorFlow graph's resize.

    Args:
        weights: file of its weights; read as tensors alone, nothing in it is executed.

    Raises:
        UserError: the file holds other weights.
        ModuleNotFoundError: torch-fidelity is not installed.
    """

    def __init__(self, weights: Path, device: torch.device) -> None:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        with refusal(f"{weights} cannot be read as weights"):
            state = torch.load(weights, map_location="cpu", weights_only=True)
        # torch-fidelity unpickles the file it is given without restriction, so it is given one of ours.
        with (
            tempfile.TemporaryDirectory() as folder,
            refusal(f"{weights} does not hold the weights of Inception v3"),
        ):
            torch.save(state, Path(folder) / WEIGHTS)
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"],
                feature_extractor_weights_path=str(Path(folder) / WEIGHTS),
            ).to(device)  # fmt: skip
        self.device = device
        self.spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: object, inputs: object, output: Tensor) -> None:
        self.spatial = output[:, :SPATIAL_CHANNELS]

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """Return the features of images uint8 [N, H, W, 3]."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(self.device)
        pool, logits = self.network(pixels)
        assert self.spatial is not None
        # Flattened as TensorFlow does it, channels last.
        spatial = self.spatial.permute(0, 2, 3, 1).flatten(1)
        return Features(*(each.float().cpu().numpy() for each in (pool, spatial, logits.softmax(dim=-1))))
