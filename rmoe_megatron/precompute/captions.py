"""Captions encoded once: those that repeat are kept in memory, and read from the shards that were written with them."""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rmoe_megatron.data.archive import parse
from rmoe_megatron.data.decoding import BFLOAT16, DECODERS
from rmoe_megatron.data.index import TEXT_HIDDEN_STATES, TEXT_POOLED
from rmoe_megatron.encoders.text import CaptionEncoder, encode_captions
from rmoe_megatron.pretrained.finite import require_finite

logger = logging.getLogger(__name__)

WIDER = (
    "set data.precompute.storage=bfloat16, which goes beyond float16's 65504, or look for damage in the encoder's weights if it is "
    "that already"
)
MAX_STORED = 1 << 20  # captions whose places in shards are remembered, at some 200 bytes


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

    Of the others it remembers where in a finished shard of this process they lie: reading one takes less than encoding it.

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
        self._stored: dict[bytes, tuple[Path, int, int]] = {}  # digest of a caption -> shard, offset, size

    def add(self, captions: set[str]) -> None:
        """Make sure that ``captions``, of one batch, are encoded."""
        new = []
        for caption in sorted(captions - self.encoded.keys(), key=lambda caption: (len(caption), caption)):
            stored = self._read(caption)
            if stored is None:
                new.append(caption)
            else:
                self._keep(caption, *stored)
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

    def remember(self, shard: Path, places: dict[str, dict[str, int]]) -> None:
        """Remember where captions lie in a shard that has been written; those that were remembered first are forgotten first."""
        for caption, place in places.items():
            self._stored[_digest(caption)] = (shard, place["offset"], place["size"])
        while len(self._stored) > MAX_STORED:
            self._stored.pop(next(iter(self._stored)))

    def _keep(self, caption: str, states: Tensor, pooled: Tensor) -> None:
        self.encoded[caption] = states, pooled
        self.bytes += states.nbytes + pooled.nbytes

    def _read(self, caption: str) -> tuple[Tensor, Tensor] | None:
        """Return a caption's embedding from a finished shard; None if there is none."""
        if (place := self._stored.get(_digest(caption))) is None:
            return None
        shard, offset, size = place
        try:
            with shard.open("rb") as file:
                file.seek(offset)
                content = memoryview(file.read(size))
            members = parse(content, offset).members
            states, pooled = (
                _tensor(bytes(content[start - offset :][:length]))
                for start, length in (members[TEXT_HIDDEN_STATES], members[TEXT_POOLED])
            )
        except (OSError, ValueError, KeyError) as error:
            logger.warning("The text in %s cannot be read again (%s); it is encoded again.", shard, error)
            return None
        return states, pooled


def _digest(caption: str) -> bytes:
    return hashlib.blake2b(caption.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _tensor(content: bytes) -> Tensor:
    array: np.ndarray = DECODERS["npy"](content)
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
