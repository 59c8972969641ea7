"""Captions encoded once: those that repeat are kept in memory, and read from the shards that were written with them."""

from collections.abc import Iterable

import torch
from torch import Tensor

from rmoe_megatron.encoders.text import CaptionEncoder, encode_captions
from rmoe_megatron.precompute.stored_captions import StoredCaptions
from rmoe_megatron.pretrained.finite import require_finite

WIDER = (
    "set data.precompute.storage=bfloat16, which goes beyond float16's 65504, or look for damage in the encoder's weights if it is "
    "that already"
)


def require_storable(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Check that encoded values are numbers in the data type that they are stored in.

    Raises:
        UserError: one is not; names it.
    """
    for name, tensor in tensors:
        dtype = str(tensor.dtype).removeprefix("torch.")
        require_finite([(name, tensor)], where, dtype, WIDER)


class CaptionCache:
    """Encodes captions, and keeps the latest ones in the order of their encoding.

    The others are read from finished shards: reading one takes less than encoding it.

    Args:
        dtype: the type in which states are kept.
        stored: finds captions in the shards of all processes; None for a shard by itself.
        max_bytes: the most that is kept beside the captions asked for last; T5's states of one caption take megabytes.
    """

    def __init__(
        self,
        text_encoder: CaptionEncoder,
        dtype: torch.dtype = torch.float16,
        stored: StoredCaptions | None = None,
        max_bytes: int = 1 << 30,
    ) -> None:
        self.text_encoder, self.dtype, self.stored, self.max_bytes = text_encoder, dtype, stored, max_bytes
        self.encoded: dict[str, tuple[Tensor, Tensor]] = {}
        self.bytes = 0

    def add(self, captions: set[str]) -> None:
        """Make sure that ``captions``, of one batch, are encoded."""
        missing = sorted(captions - self.encoded.keys(), key=lambda caption: (len(caption), caption))
        if self.stored is not None and not all(caption in self.stored for caption in missing):
            self.stored.look()
        new = []
        for caption in missing:
            found = self.stored.find(caption) if self.stored is not None else None
            if found is None:
                new.append(caption)
            else:
                self._keep(caption, *found)
        if new:
            text = encode_captions(self.text_encoder, new)
            rows = zip(text.hidden_states.to(self.dtype).cpu(), text.pooled.to(self.dtype).cpu(), strict=True)
            for caption, (states, pooled) in zip(new, rows, strict=True):
                named = [("its token states", states), ("its pooled embedding", pooled)]
                require_storable(named, f"The caption {caption!r:.60}")
                # Copies: a view would keep the whole batch alive.
                self._keep(caption, states.clone(), pooled.clone())
        for caption in [each for each in self.encoded if each not in captions]:
            if self.bytes <= self.max_bytes:
                break
            self.bytes -= sum(tensor.nbytes for tensor in self.encoded.pop(caption))

    def _keep(self, caption: str, states: Tensor, pooled: Tensor) -> None:
        self.encoded[caption] = states, pooled
        self.bytes += states.nbytes + pooled.nbytes
