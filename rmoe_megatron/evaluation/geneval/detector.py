"""Instances of COCO's classes in an image, by Mask2Former: the published evaluation's detector, with transformers' weights.

The published code runs mmdet's Mask2Former (Swin-S, COCO instances). What it does before and after the network is done here in the
same way; the weights are those that transformers' users have, converted by their publishers from another training of the same
architecture, so single detections near a threshold may differ.
"""

from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.geneval.opencv_resize import resize
from rmoe_megatron.evaluation.geneval.prompts import CLASSES
from rmoe_megatron.evaluation.geneval.rules import Detection
from rmoe_megatron.pretrained.loading import load_judge

SHORT_SIDE, LONG_SIDE, DIVISOR = 800, 1333, 32  # pixels: mmdet's resize and padding for testing
PADDING = 128  # grey, put there before the picture is normalised
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MAX_INSTANCES = 100  # per image, over all classes
EPSILON = 1e-6


class Detector:
    """Mask2Former with what mmdet does around it.

    Args:
        folder: holds a Mask2Former for COCO's instances.
        short_side: pixels that an image's shorter side is resized to.

    Raises:
        UserError: the folder holds another model, or one of other classes.
    """

    def __init__(self, folder: Path, device: torch.device, short_side: int = SHORT_SIDE) -> None:
        self.model = load_judge(folder, Mask2FormerForUniversalSegmentation).to(device)
        self.device, self.short_side = device, short_side
        if self.model.config.num_labels != len(CLASSES):
            raise UserError(
                f"{folder} detects {self.model.config.num_labels} classes, but GenEval needs COCO's {len(CLASSES)} instances."
            )

    def to(self, device: torch.device) -> Self:
        """Move the model."""
        self.device = device
        self.model.to(device)
        return self

    @torch.no_grad()
    def detect(self, image: Image.Image) -> dict[str, list[Detection]]:
        """Return the instances of an RGB image by class, in no order."""
        pixels = np.asarray(image.convert("RGB"))
        padded, size = self.prepare(pixels)
        output = self.model(pixel_values=padded[None].to(self.device, self.model.dtype))
        masks = F.interpolate(
            output.masks_queries_logits.float(), size=padded.shape[-2:], mode="bilinear", align_corners=False
        )[..., : size[0], : size[1]]
        masks = F.interpolate(masks, size=pixels.shape[:2], mode="bilinear", align_corners=False)[0]
        return instances(output.class_queries_logits[0].float(), masks)

    def prepare(self, pixels: NDArray[np.uint8]) -> tuple[Tensor, tuple[int, int]]:
        """Return the network's input float32 [3, H, W] of pixels uint8 [h, w, 3], and the size without its padding.

        The sides are resized to the testing scale with their proportions, padded below and at the right, then normalised.
        """
        height, width = pixels.shape[:2]
        long_side = self.short_side * LONG_SIDE / SHORT_SIDE
        scale = min(self.short_side / min(height, width), long_side / max(height, width))
        size = (int(height * scale + 0.5), int(width * scale + 0.5))
        edges = [(0, -side % DIVISOR) for side in size]
        padded = np.pad(resize(pixels, *size), [*edges, (0, 0)], constant_values=PADDING)
        # As mmcv does it: the difference in float32, times the reciprocal in float64.
        normalised = (padded - np.array(MEAN, np.float32)).astype(np.float64) * (1 / np.array(STD))
        return torch.from_numpy(normalised.astype(np.float32)).permute(2, 0, 1), size


def instances(class_logits: Tensor, masks: Tensor) -> dict[str, list[Detection]]:
    """Turn the network's queries into detections.

    Of all (query, class) pairs the ``MAX_INSTANCES`` most probable are taken; the score is the class's probability times the
    mean probability of the mask inside itself; the box is the mask's.

    Args:
        class_logits: [Q, C + 1], the last of which is no object.
        masks: logits [Q, H, W] at the image's size.
    """
    probabilities = class_logits.softmax(-1)[:, :-1]
    number = min(MAX_INSTANCES, probabilities.numel())
    scores, order = probabilities.flatten().topk(number, sorted=False)
    queries, labels = order // probabilities.shape[1], order % probabilities.shape[1]
    found: dict[str, list[Detection]] = {}
    for score, query, label in zip(scores, queries, labels, strict=True):
        inside = masks[query] > 0
        quality = (masks[query].sigmoid() * inside).sum() / (inside.sum() + EPSILON)
        mask = inside.cpu().numpy()
        found.setdefault(CLASSES[int(label)], []).append(Detection(_box(mask), float(score * quality), mask))
    return found


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return (0.0, 0.0, 0.0, 0.0)
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
