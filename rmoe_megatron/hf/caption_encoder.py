"""A transformers encoder whose token states feed the text stream and whose mean feeds the conditioning vector.

This file needs transformers alone: an exported folder can carry it (``--remote-code``).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The token states of MiniLM's third block have standard deviation 0.572 over the toy shapes captions; this brings them to about 1.
TOKEN_STATE_SCALE = 1.75


@dataclass
class TextEmbeddings:
    """Encoded captions: token states float32 [B, L, D] and pooled embeddings float32 [B, P]."""

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

    def components(self) -> dict[str, object]:
        """Return encoder and tokenizer under the names of a diffusers pipeline's arguments."""
        return {"text_encoder": self.model, "tokenizer": self.tokenizer}
