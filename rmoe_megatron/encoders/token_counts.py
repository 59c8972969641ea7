"""How many tokens captions have for a run's text encoder, to be held against what it takes of them."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rmoe_megatron.config.model import EncodersConfig
from rmoe_megatron.encoders.minilm import minilm_folder
from rmoe_megatron.encoders.text import has_one_encoder
from rmoe_megatron.pretrained.hub import model_folder
from rmoe_megatron.pretrained.loading import load_tokenizer
from rmoe_megatron.pretrained.model_files import MODEL_INDEX, text_encoder_parts

CLIP_LENGTH = 77
CLIP_TOKENIZER, T5_TOKENIZER = "tokenizer", "tokenizer_3"  # of a Stable Diffusion 3 pipeline


@dataclass(frozen=True)
class TokenCounter:
    """Counts tokens of captions, special ones included; it may go into other processes.

    Stable Diffusion 3's captions are cut twice, to 77 tokens of CLIP and to the rest of ``text_length`` of T5: those of T5 are counted,
    which takes in more of a caption, or those of CLIP where T5 is not there.

    Attributes:
        folder: the folder that holds the tokenizer.
        limit: how many tokens of a caption are encoded.
    """

    folder: str
    limit: int

    def __call__(self, captions: list[str]) -> list[int]:
        """Return the number of tokens of each caption, without a limit."""
        tokens = _tokenizer(self.folder)(captions, truncation=False, verbose=False)["input_ids"]
        return list(map(len, tokens))


_loaded: dict[str, Any] = {}


def _tokenizer(folder: str) -> Any:
    """Return a tokenizer, which each process loads once."""
    if folder not in _loaded:
        _loaded[folder] = load_tokenizer(Path(folder))
    return _loaded[folder]


def token_counter(encoders: EncodersConfig, text_length: int) -> TokenCounter:
    """Return what counts the tokens of a configuration's text encoder.

    Raises:
        UserError: it is not here.
    """
    name = encoders.text_encoder
    parts = partial(text_encoder_parts, dropped=encoders.dropped)
    folder = minilm_folder() if name == "minilm" else model_folder(name, parts)
    if has_one_encoder(folder):
        return TokenCounter(str(folder / "tokenizer"), text_length)
    if not (folder / MODEL_INDEX).exists():
        return TokenCounter(str(folder), text_length)
    if "t5" in encoders.dropped or not (folder / T5_TOKENIZER).is_dir():
        return TokenCounter(str(folder / CLIP_TOKENIZER), CLIP_LENGTH)
    return TokenCounter(str(folder / T5_TOKENIZER), text_length - CLIP_LENGTH)
