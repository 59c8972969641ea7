"""Questions about an image to a model of transformers that sees and speaks: the probabilities of its first word."""

from pathlib import Path
from typing import Protocol, Self

import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.qwen_pixels import MODES, QwenPixels
from rmoe_megatron.launch import local_rank
from rmoe_megatron.platform import inference_device
from rmoe_megatron.pretrained.config_files import OBJECT, check_unknown_keys
from rmoe_megatron.pretrained.hub import model_folder
from rmoe_megatron.pretrained.loading import load_judge, load_tokenizer
from rmoe_megatron.pretrained.model_files import judge_parts
from rmoe_megatron.refusal import refusal
from rmoe_megatron.typed_files import read_json

QWEN3_VL = "Qwen/Qwen3-VL-8B-Instruct"
IMAGE, BEFORE, AFTER = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
# Its chat template for one question about one image, written out: nothing of a folder is executed.
CHAT = "<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n"


class Answerer(Protocol):
    """Answers questions about images with probabilities of tokens."""

    def to(self, device: torch.device) -> Self:
        """Move the model."""
        ...

    def first_token(self, image: Image.Image, question: str) -> Tensor:
        """Return the probabilities of the answer's first token, float32 [vocabulary]."""
        ...

    def first_token_of(self, word: str) -> int:
        """Return the number of the token that ``word`` begins with."""
        ...

    def spell(self, token: int) -> str:
        """Return the text of a token."""
        ...


class Qwen3VL:
    """Qwen3-VL of transformers.

    Args:
        name: folder or hub repository.

    Raises:
        UserError: it cannot be had, or is another model.
    """

    def __init__(self, name: str) -> None:
        folder = model_folder(name, judge_parts)
        self.device = inference_device(local_rank())
        self.model = load_judge(folder, Qwen3VLForConditionalGeneration).to(self.device)
        self.tokenizer = load_tokenizer(folder)
        self.processor = _image_processor(folder)
        self.image_token = self.model.config.image_token_id

    def to(self, device: torch.device) -> Self:
        """Move the model."""
        self.device = device
        self.model.to(device)
        return self

    @torch.no_grad()
    def first_token(self, image: Image.Image, question: str) -> Tensor:
        """Return the probabilities of the answer's first token, float32 [vocabulary]."""
        pixels = self.processor(images=[image.convert("RGB")], return_tensors="pt")
        grid = pixels["image_grid_thw"]
        places = int(grid[0].prod()) // self.processor.merge_size**2
        text = CHAT.format(image=BEFORE + IMAGE * places + AFTER, question=question)
        tokens = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(
            self.device
        )
        logits = self.model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            mm_token_type_ids=(tokens == self.image_token).int(),
            pixel_values=pixels["pixel_values"].to(self.device, self.model.dtype),
            image_grid_thw=grid.to(self.device),
            logits_to_keep=1,
        ).logits
        return logits[0, -1].float().softmax(dim=-1).cpu()

    def first_token_of(self, word: str) -> int:
        """Return the number of the token that ``word`` begins with."""
        return int(self.tokenizer.encode(word)[0])

    def spell(self, token: int) -> str:
        """Return the text of a token."""
        return self.tokenizer.decode([token])


def _image_processor(folder: Path) -> QwenPixels:
    path = folder / "preprocessor_config.json"
    check_unknown_keys(read_json(path, OBJECT), path)
    with refusal(f"{path} cannot be used"):
        processor = QwenPixels.from_pretrained(folder, local_files_only=True)
    if processor.resample not in MODES:
        raise UserError(
            f"{path} has resample {processor.resample!r:.40}; 2 (bilinear) and 3 (bicubic) are known."
        )
    return processor
