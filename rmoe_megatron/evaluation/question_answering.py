"""Questions about an image to a model of transformers that sees and speaks: the probabilities of its first word, or its answer."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    GenerationConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
)

from rmoe_megatron.distributed.device import inference_device
from rmoe_megatron.distributed.launch import local_rank
from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.qwen_pixels import MODES, QwenPixels
from rmoe_megatron.files.foreign_errors import refusal
from rmoe_megatron.files.untrusted import read_json, read_text
from rmoe_megatron.pretrained.config_files import OBJECT, check_unknown_keys
from rmoe_megatron.pretrained.hub import model_folder
from rmoe_megatron.pretrained.loading import load_judge, load_tokenizer
from rmoe_megatron.pretrained.model_files import judge_parts

QWEN3_VL = "Qwen/Qwen3-VL-8B-Instruct"
IMAGE, BEFORE, AFTER = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
# Its chat template for one question about one image, written out: nothing of a folder is executed.
CHAT = "<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n"
ENDS = ("<|im_end|>", "<|endoftext|>")  # of an answer
PADDING = (
    "<|im_start|>"  # which every conversation has, so that a penalty for repetition does not tell them apart
)
TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
MIXTURE = "qwen3_vl_moe"


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
    """Qwen3-VL of transformers, dense or a mixture of experts.

    Args:
        name: folder or hub repository.

    Attributes:
        thinks: whether it writes down its thoughts before it answers, which its chat template begins for it.

    Raises:
        UserError: it is not here and cannot be downloaded, or is another model.
    """

    def __init__(self, name: str) -> None:
        folder = model_folder(name, judge_parts)
        self.device = inference_device(local_rank())
        self.model = load_judge(folder, _model_class(folder)).to(self.device)
        self.tokenizer = load_tokenizer(folder)
        self.processor = load_image_processor(folder)
        self.image_token = self.model.config.image_token_id
        self.thinks = thinks(folder)

    def to(self, device: torch.device) -> Self:
        """Move the model."""
        self.device = device
        self.model.to(device)
        return self

    @torch.no_grad()
    def first_token(self, image: Image.Image, question: str) -> Tensor:
        """Return the probabilities of the answer's first token, float32 [vocabulary]."""
        pixels, marks = self._see(image)
        text = CHAT.format(image=marks, question=question)
        tokens = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(
            self.device
        )
        logits = self.model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            mm_token_type_ids=(tokens == self.image_token).int(),
            logits_to_keep=1,
            **pixels,
        ).logits
        return logits[0, -1].float().softmax(dim=-1).cpu()

    @torch.no_grad()
    def generate(
        self,
        image: Image.Image,
        before: str,
        after: Sequence[str],
        max_tokens: int,
        repetition_penalty: float = 1.0,
    ) -> list[list[int]]:
        """Continue conversations about one image at a time, all of them at once; decoding is greedy.

        Args:
            before: what stands before the image in all of them.
            after: what stands behind it in each.
            max_tokens: the longest answer.
            repetition_penalty: by which the logits of tokens are divided (multiplied where they are negative) that a conversation has.

        Returns:
            The tokens of every answer, without that which ends it.
        """
        pixels, marks = self._see(image)
        texts = [before + marks + each for each in after]
        tokens = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        padding, *ends = self.tokenizer.convert_tokens_to_ids([PADDING, *ENDS])
        length = max(map(len, tokens))
        inputs = torch.tensor([[padding] * (length - len(each)) + each for each in tokens])
        attended = torch.tensor([[0] * (length - len(each)) + [1] * len(each) for each in tokens])
        number = len(tokens)
        found = self.model.generate(
            input_ids=inputs.to(self.device),
            attention_mask=attended.to(self.device),
            mm_token_type_ids=(inputs == self.image_token).int().to(self.device),
            pixel_values=pixels["pixel_values"].repeat(number, 1),
            image_grid_thw=pixels["image_grid_thw"].repeat(number, 1),
            generation_config=GenerationConfig(
                max_new_tokens=max_tokens, do_sample=False, repetition_penalty=repetition_penalty, eos_token_id=ends,
                pad_token_id=padding,
            ),
        )[:, length:].tolist()  # fmt: skip
        lengths = [
            next((place for place, token in enumerate(each) if token in ends), len(each)) for each in found
        ]
        return [each[:stop] for each, stop in zip(found, lengths, strict=True)]

    def _see(self, image: Image.Image) -> tuple[dict[str, Tensor], str]:
        """Return an image as the model takes it, and the marks that stand for it in a text."""
        seen = self.processor(images=[image.convert("RGB")], return_tensors="pt")
        grid = seen["image_grid_thw"]
        places = int(grid[0].prod()) // self.processor.merge_size**2
        pixels = seen["pixel_values"].to(self.device, self.model.dtype)
        marks = BEFORE + IMAGE * places + AFTER
        return {"pixel_values": pixels, "image_grid_thw": grid.to(self.device)}, marks

    def first_token_of(self, word: str) -> int:
        """Return the number of the token that ``word`` begins with."""
        return int(self.tokenizer.encode(word)[0])

    def spell(self, token: int) -> str:
        """Return the text of a token."""
        return self.tokenizer.decode([token])


def thinks(folder: Path) -> bool:
    """Whether the chat template of a folder begins an answer with thoughts; it is read as text, and not executed."""
    texts = [read_text(folder / name) for name in TEMPLATES if (folder / name).is_file()]
    return any(re.search(r"assistant\\+n<think>", text) for text in texts)


def _model_class(folder: Path) -> Any:
    kind = read_json(folder / "config.json", OBJECT).get("model_type")
    return Qwen3VLMoeForConditionalGeneration if kind == MIXTURE else Qwen3VLForConditionalGeneration


def load_image_processor(folder: Path) -> QwenPixels:
    """Load what turns pictures into the numbers that a Qwen2-VL or Qwen3-VL takes.

    Raises:
        UserError: ``preprocessor_config.json`` is missing or malformed.
    """
    path = folder / "preprocessor_config.json"
    check_unknown_keys(read_json(path, OBJECT), path)
    with refusal(f"{path} cannot be used"):
        processor = QwenPixels.from_pretrained(folder, local_files_only=True)
    if processor.resample not in MODES:
        raise UserError(
            f"{path} has resample {processor.resample!r:.40}; 2 (bilinear) and 3 (bicubic) are known."
        )
    return processor
