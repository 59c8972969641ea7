"""PickScore (arXiv 2305.01569): a CLIP ViT-H/14 that was trained on people's choices between two pictures of a prompt."""

from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel

from rmoe_megatron.evaluation.early_checks import SCORERS
from rmoe_megatron.files.foreign_errors import refusal
from rmoe_megatron.files.untrusted import read_json
from rmoe_megatron.pretrained.config_files import OBJECT, check_unknown_keys
from rmoe_megatron.pretrained.loading import load_judge, load_tokenizer

WEIGHTS, BASE = SCORERS["pickscore"]
TEXT_LENGTH = 77  # tokens; what is longer is cut


class PickScore:
    """The cosine of a picture and its prompt in the model's space, times its temperature.

    Args:
        weights: folder of the model.
        base: folder of the tokenizer and the image processor, which are CLIP's.

    Raises:
        UserError: a folder does not hold what it should.
    """

    def __init__(self, weights: Path, base: Path, device: torch.device) -> None:
        self.model, self.tokenizer = load_judge(weights, CLIPModel).to(device), load_tokenizer(base)
        self.processor, self.device = _image_processor(base), device

    def to(self, device: torch.device) -> Self:
        """Move the model."""
        self.device = device
        self.model.to(device)
        return self

    @torch.no_grad()
    def score(self, image: Image.Image, prompt: str) -> float:
        """Return the score of a picture for its prompt."""
        pixels = self.processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"]
        tokens = self.tokenizer([prompt], truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
        seen = self.model.vision_model(pixel_values=pixels.to(self.device, self.model.dtype)).pooler_output
        read = self.model.text_model(**tokens.to(self.device)).pooler_output
        image_features: Tensor = F.normalize(self.model.visual_projection(seen).float(), dim=-1)
        text_features: Tensor = F.normalize(self.model.text_projection(read).float(), dim=-1)
        cosine = (image_features * text_features).sum()
        return float(self.model.logit_scale.float().exp() * cosine)


def _image_processor(folder: Path) -> Any:
    path = folder / "preprocessor_config.json"
    check_unknown_keys(read_json(path, OBJECT), path)
    with refusal(f"{path} cannot be used"):
        return CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
