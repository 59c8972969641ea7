"""The colour of a detected object, by CLIP ViT-L/14 without training: GenEval's texts, crop and background."""

from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel

from rmoe_megatron.evaluation.geneval.prompts import COLORS
from rmoe_megatron.evaluation.geneval.rules import Detection
from rmoe_megatron.pretrained.loading import load_judge, load_tokenizer

TEXTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
BACKGROUND = "#999"  # outside of the object's mask
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ColorClassifier:
    """CLIP with a text embedding for every colour of a class.

    Args:
        folder: holds a CLIP of transformers with its tokenizer.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.model, self.tokenizer = load_judge(folder, CLIPModel).to(device), load_tokenizer(folder)
        self.device, self.side = device, self.model.config.vision_config.image_size
        self._texts: dict[str, Tensor] = {}

    def to(self, device: torch.device) -> Self:
        """Move the model."""
        self.device = device
        self.model.to(device)
        self._texts.clear()
        return self

    @torch.no_grad()
    def classify(self, image: Image.Image, objects: list[Detection], name: str) -> list[str]:
        """Return the colour of each object, which is of the class ``name``."""
        crops = torch.stack([self._pixels(crop(image, each)) for each in objects])
        pixels = crops.to(self.device, self.model.dtype)
        vision = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        similarity = F.normalize(vision.float(), dim=-1) @ self._classes(name).T
        return [COLORS[index] for index in similarity.argmax(dim=-1).tolist()]

    def _classes(self, name: str) -> Tensor:
        """Return the normalised mean of the texts' normalised embeddings, [colours, features]."""
        if name not in self._texts:
            texts = [text.format(color=color, name=name) for color in COLORS for text in TEXTS]
            tokens = self.tokenizer(
                texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
            )
            hidden = self.model.text_model(**tokens.to(self.device)).pooler_output
            embedded = F.normalize(self.model.text_projection(hidden).float(), dim=-1)
            self._texts[name] = F.normalize(embedded.view(len(COLORS), len(TEXTS), -1).mean(dim=1), dim=-1)
        return self._texts[name]

    def _pixels(self, image: Image.Image) -> Tensor:
        """Return a crop as CLIP was trained with it, normalised float32 [3, S, S]."""
        pixels = torch.from_numpy(np.asarray(central_square(image, self.side), dtype=np.float32) / 255)
        return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)


def central_square(image: Image.Image, side: int) -> Image.Image:
    """Resize the shorter side to ``side`` pixels and return the central square, with the roundings of torchvision.

    The longer side is cut to whole pixels, and half a pixel of the square's place is rounded to the even number.
    """
    size = [int(side * each / min(image.size)) for each in image.size]
    left, top = (round((each - side) / 2) for each in size)
    return image.resize((size[0], size[1]), Image.Resampling.BICUBIC).crop(
        (left, top, left + side, top + side)
    )


def crop(image: Image.Image, found: Detection) -> Image.Image:
    """Return the object's box, grey outside of its mask."""
    rgb = image.convert("RGB")
    if found.mask is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, BACKGROUND), Image.fromarray(found.mask))
    left, top, right, bottom = (round(edge) for edge in found.box)
    return rgb.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
