"""Captions encoded once: those that repeat are kept."""

import torch
from torch import Tensor

from rmoe_megatron.encoders.text import CaptionEncoder, encode_captions


class CaptionCache:
    """Encodes captions and keeps the latest ones, whose order is that of their encoding: toy captions repeat.

    Args:
        dtype: of what is kept.
        max_bytes: of what is kept beside the captions asked for last; T5's states of one caption take megabytes.
    """

    def __init__(
        self, text_encoder: CaptionEncoder, dtype: torch.dtype = torch.float16, max_bytes: int = 1 << 30
    ) -> None:
        self.text_encoder, self.dtype, self.max_bytes = text_encoder, dtype, max_bytes
        self.encoded: dict[str, tuple[Tensor, Tensor]] = {}
        self.bytes = 0

    def add(self, captions: set[str]) -> None:
        """Make sure that ``captions``, of one batch, are encoded."""
        new = sorted(captions - self.encoded.keys(), key=lambda caption: (len(caption), caption))
        if not new:
            return
        text = encode_captions(self.text_encoder, new)
        rows = zip(text.hidden_states.to(self.dtype).cpu(), text.pooled.to(self.dtype).cpu(), strict=True)
        for caption, (states, pooled) in zip(new, rows, strict=True):
            # Copies: a view would keep the whole batch alive.
            self.encoded[caption] = states.clone(), pooled.clone()
            self.bytes += states.nbytes + pooled.nbytes
        for caption in [each for each in self.encoded if each not in captions]:
            if self.bytes <= self.max_bytes:
                break
            self.bytes -= sum(tensor.nbytes for tensor in self.encoded.pop(caption))
