"""Which frozen text encoder a run has: MiniLM, another transformers encoder, or the three of Stable Diffusion 3."""

from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from rmoe_megatron.config.model import EncodersConfig
from rmoe_megatron.encoders.minilm import MINILM_BLOCKS, has_minilm, minilm_folder
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.foreign_errors import refusal
from rmoe_megatron.files.untrusted import read_json
from rmoe_megatron.hf.caption_encoder import TextEmbeddings, TextEncoder
from rmoe_megatron.hf.pipeline import RecurrentSD3Pipeline
from rmoe_megatron.pretrained.config_files import OBJECT
from rmoe_megatron.pretrained.hub import model_folder
from rmoe_megatron.pretrained.loading import load_text_encoder_folder, load_tokenizer
from rmoe_megatron.pretrained.model_files import MODEL_INDEX, TRANSFORMERS_WEIGHTS, text_encoder_parts
from rmoe_megatron.pretrained.safetensors_folder import SafetensorsFolder


class CaptionEncoder(Protocol):
    """A frozen text encoder, or several behind one interface."""

    def encode(self, captions: list[str]) -> TextEmbeddings:
        """Encode captions; longer ones are cut."""
        ...

    def components(self) -> dict[str, object]:
        """Return the encoders and tokenizers under the names of a diffusers pipeline's arguments."""
        ...


def encode_captions(encoder: CaptionEncoder, captions: list[str]) -> TextEmbeddings:
    """Encode captions with an encoder that may come from others.

    Raises:
        UserError: encoder and tokenizer do not fit together.
    """
    with refusal("The parts of encoders.text_encoder do not fit together"):
        return encoder.encode(captions)


def has_one_encoder(folder: Path) -> bool:
    """Whether a folder is an exported pipeline with one text encoder, where Stable Diffusion 3's has three."""
    path = folder / MODEL_INDEX
    return path.exists() and read_json(path, OBJECT).get("_class_name") == RecurrentSD3Pipeline.__name__


def is_minilm(folder: Path) -> bool:
    """Whether the text encoder of an exported pipeline is ``minilm``, weight by weight and word by word."""
    weights = (
        folder / "text_encoder" / TRANSFORMERS_WEIGHTS
    )  # not there of a repository of which an import has no need
    if not has_minilm() or not weights.is_file():
        return False
    own = load_text_encoder(EncodersConfig(), 1, torch.device("cpu")).components()
    model, tokenizer = own["text_encoder"], own["tokenizer"]
    assert isinstance(model, PreTrainedModel)
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    expected = model.state_dict()
    found = SafetensorsFolder(folder / "text_encoder", TRANSFORMERS_WEIGHTS)
    return (
        found.shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
        and all(torch.equal(found.read(name), tensor) for name, tensor in expected.items())
        and load_tokenizer(folder / "tokenizer").get_vocab() == tokenizer.get_vocab()
    )


def load_text_encoder(
    encoders: EncodersConfig, text_length: int, device: torch.device, text_hidden_size: int | None = None
) -> CaptionEncoder:
    """Load ``minilm``, a transformers encoder, or the text encoders of a Stable Diffusion 3 pipeline or of an exported one.

    Args:
        text_hidden_size: width of the text states that the model takes, which a pipeline without T5 does not say.

    Raises:
        UserError: the package or the folder is missing, or a file of it is malformed.
    """
    name = encoders.text_encoder
    parts = partial(text_encoder_parts, dropped=encoders.dropped)
    folder = minilm_folder() if name == "minilm" else model_folder(name, parts)
    if has_one_encoder(folder):
        tokenizer = load_tokenizer(folder / "tokenizer")
        model = load_text_encoder_folder(folder / "text_encoder", AutoModel, torch.float32)
        return TextEncoder(model.to(device), tokenizer, text_length)
    if (folder / MODEL_INDEX).exists():
        from rmoe_megatron.encoders.sd3_text import load_sd3_text_encoders

        return load_sd3_text_encoders(folder, encoders.dropped, text_length, device, text_hidden_size)
    if not (folder / "config.json").exists():
        raise UserError(
            f"There is no text encoder in {name} (no config.json); give a transformers folder, an SD3 pipeline's "
            "folder, or `minilm`."
        )
    tokenizer = load_tokenizer(folder)
    model = load_text_encoder_folder(folder, AutoModel, torch.float32)
    if name == "minilm":
        model.encoder.layer = model.encoder.layer[:MINILM_BLOCKS]
        model.config.num_hidden_layers = MINILM_BLOCKS  # an exported folder holds these blocks alone
    return TextEncoder(model.to(device), tokenizer, text_length)
