"""HPSv3 (arXiv 2508.03789): a Qwen2-VL-7B with a head that gives the mean and the spread of a picture's preference.

Its package asks for one version of transformers that is older than the ones this package takes, so the model is put together here, under
the names that its published weights have. The instruction that it was trained with is its authors' text and is not part of this
package: the user gives it as a file, and the result says whether it is the published one.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.early_checks import SCORERS
from rmoe_megatron.evaluation.question_answering import AFTER, BEFORE, IMAGE, load_image_processor
from rmoe_megatron.files.foreign_errors import refusal
from rmoe_megatron.files.untrusted import read_json, read_text
from rmoe_megatron.pretrained.config_files import OBJECT, check_unknown_keys
from rmoe_megatron.pretrained.loading import load_tokenizer
from rmoe_megatron.pretrained.model_files import Parts
from rmoe_megatron.pretrained.safetensors_folder import SafetensorsFolder, list_problems

WEIGHTS, BASE = SCORERS["hpsv3"]
FILE = "HPSv3.safetensors"
# INSTRUCTION + prompt_with_special_token of hpsv3/dataset/data_collator_qwen.py in hpsv3 1.0.0, without the space around it.
PUBLISHED_INSTRUCTION_SHA256 = "41af80e21f2a9bc8fe90d355d430a21db3af8d21f57a99885d55dd20ea1d7f08"
REWARD, PROMPT = (
    "<|Reward|>",
    "{text_prompt}",
)  # in the instruction, once each: where the score is read, and the prompt
PATCHES = 256  # two by two patches that a picture is resized to, as near as its shape allows
MAX_INSTRUCTION = 1 << 16  # bytes
# Qwen2-VL's chat template for one picture with a text, written out: nothing of a folder is executed.
CHAT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{picture}{text}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Instruction:
    """What HPSv3 is told with a picture, with places for the prompt and for the token whose state is scored."""

    text: str

    @property
    def sha256(self) -> str:
        """The SHA-256 of the text, as hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def is_published(self) -> bool:
        """Whether it is the one that the model was trained with."""
        return self.sha256 == PUBLISHED_INSTRUCTION_SHA256


def read_instruction(path: Path) -> Instruction:
    """Return the instruction of a text file; space around it does not count.

    Raises:
        UserError: the file is no text, or does not have both places once.
    """
    text = read_text(path, MAX_INSTRUCTION, follow=True).removeprefix("\ufeff").replace("\r\n", "\n").strip()
    for place in (PROMPT, REWARD):
        if text.count(place) != 1:
            raise UserError(
                f"{path} has {place} {text.count(place)} times, not once; give HPSv3's instruction as its package has it."
            )
    return Instruction(text)


def weight_parts(names: object) -> Parts:
    """Return the part of HPSv3's repository that it is loaded from."""
    return {"": FILE}


def base_parts(names: object) -> Parts:
    """Return the part of Qwen2-VL's repository that is needed: what it says of itself, and no weights."""
    return {"": None}


class HPSv3:
    """The mean of a picture's preference, read where the instruction has its special token.

    Args:
        weights: folder of ``HPSv3.safetensors``.
        base: folder of Qwen2-VL's configuration, tokenizer and image processor.
        dtype: what all but the head is computed in; the head is fp32, and the published code takes bf16.

    Raises:
        UserError: a folder does not hold what it should.
    """

    def __init__(
        self,
        weights: Path,
        base: Path,
        instruction: Instruction,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.instruction, self.device = instruction, device
        self.tokenizer, self.processor = load_tokenizer(base), load_image_processor(base)
        self.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD]})
        self.model, self.head = _load(weights, base, dtype)
        self.to(device)

    def to(self, device: torch.device) -> Self:
        """Move the model."""
        self.device = device
        self.model.to(device)
        self.head.to(device)
        return self

    @torch.no_grad()
    def score(self, image: Image.Image, prompt: str) -> float:
        """Return the score of a picture for its prompt."""
        seen = self.processor(images=[self._resized(image.convert("RGB"))], return_tensors="pt")
        grid = seen["image_grid_thw"]
        places = int(grid[0].prod()) // self.processor.merge_size**2
        # The prompt is put in last: it may hold what looks like a place.
        before, after = f"\n{self.instruction.text}\n".split(PROMPT)
        text = CHAT.format(picture=BEFORE + IMAGE * places + AFTER, text=before + prompt + after)
        tokens = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].to(
            self.device
        )
        states = self.model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            mm_token_type_ids=(tokens == self.model.config.image_token_id).int(),
            # As the published code: places in a row, without Qwen2-VL's rows and columns.
            position_ids=torch.arange(tokens.shape[1], device=self.device)[None],
            pixel_values=seen["pixel_values"].to(self.device, self.model.dtype),
            image_grid_thw=grid.to(self.device),
        ).last_hidden_state
        reward = int(self.tokenizer.convert_tokens_to_ids(REWARD))
        (place,) = (tokens[0] == reward).nonzero()[-1:].flatten().tolist()
        return float(self.head(states[0, place].float())[0])

    def _resized(self, image: Image.Image) -> Image.Image:
        factor = self.processor.patch_size * self.processor.merge_size
        size = PATCHES * factor**2
        height, width = smart_resize(image.height, image.width, factor, size, size)
        return image.resize((width, height), Image.Resampling.BICUBIC)


def head_of(width: int) -> nn.Sequential:
    """Return the head from a state to mean and spread, with the names of the published weights; dropouts do nothing here."""
    layers = {
        "0": nn.Linear(width, 1024), "1": nn.ReLU(), "3": nn.Linear(1024, 16), "4": nn.ReLU(), "5": nn.Linear(16, 2),
    }  # fmt: skip
    return nn.Sequential(OrderedDict(layers))


def _load(weights: Path, base: Path, dtype: torch.dtype) -> tuple[Qwen2VLModel, nn.Sequential]:
    files = SafetensorsFolder(weights, FILE)
    names = {name: _own_name(name) for name in files.shapes}
    path = base / "config.json"
    values = read_json(path, OBJECT)
    check_unknown_keys(values, path)
    if values.get("model_type") != Qwen2VLConfig.model_type:
        raise UserError(
            f"{base} holds a model of type {values.get('model_type')!r:.40}, where qwen2_vl belongs."
        )
    with refusal(f"{path} cannot be used"):
        config = Qwen2VLConfig.from_dict(values)
    # The table of tokens was cut to the tokenizer's length when the special token was added.
    embeddings = next(
        (name for name, own in names.items() if own == "language_model.embed_tokens.weight"), None
    )
    if embeddings is not None:
        config.text_config.vocab_size = files.shapes[embeddings][0]
    with refusal(f"{path} cannot be used"), torch.device("meta"):
        model, head = Qwen2VLModel(config), head_of(config.text_config.hidden_size)
    expected = {name: tuple(each.shape) for name, each in model.state_dict().items()}
    expected |= {f"rm_head.{name}": tuple(each.shape) for name, each in head.state_dict().items()}
    own = {names[name]: shape for name, shape in files.shapes.items()}
    problems = [f"missing {name}" for name in expected if name not in own]
    problems += [
        f"{name} has shape {own[name]} instead of {shape}"
        for name, shape in expected.items()
        if own.get(name, shape) != shape
    ]
    if problems:
        raise UserError(
            f"{weights / FILE} does not hold the weights of HPSv3 on {base}: {list_problems(problems)}."
        )
    read: dict[str, Tensor] = {names[name]: files.read(name) for name in names if names[name] in expected}
    body = {name: tensor.to(dtype) for name, tensor in read.items() if not name.startswith("rm_head.")}
    with refusal(f"{weights / FILE} cannot be loaded"):
        model = Qwen2VLModel.from_pretrained(None, config=config, state_dict=body, dtype=dtype)
    of_head = {
        name.removeprefix("rm_head."): each for name, each in read.items() if name.startswith("rm_head.")
    }
    head.load_state_dict({name: tensor.float() for name, tensor in of_head.items()}, assign=True)
    return model.eval().requires_grad_(False), head.eval().requires_grad_(False)


def _own_name(name: str) -> str:
    """Return the name in Qwen2VLModel of a published tensor, whose names are those of transformers 4.45 or of later ones."""
    name = (
        name.removeprefix("model.") if name.startswith(("model.visual.", "model.language_model.")) else name
    )
    return f"language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name
