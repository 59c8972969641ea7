"""One shard encoded: every sample's pictures and caption, once."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.config.run import Latents, PrecomputeConfig, Storage
from rmoe_megatron.data.shards.dataset import NoSamplesError, ShardDataset
from rmoe_megatron.data.shards.decoding import View, decode_image
from rmoe_megatron.data.shards.index import IMAGES, LATENTS, LOG_VARIANCE, SHARED
from rmoe_megatron.data.shards.writer import ShardWriter, open_shard
from rmoe_megatron.data.training_dataset import CLASS_LABEL, TEXT_HIDDEN_STATES, TEXT_POOLED, SampleFormat
from rmoe_megatron.encoders.autoencoder import Autoencoder, encode_distributions, encode_images
from rmoe_megatron.precompute.captions import CaptionCache, require_storable

logger = logging.getLogger(__name__)

BATCH = 256  # views of pictures
DTYPES = {Storage.float16: torch.float16, Storage.bfloat16: torch.bfloat16}
COPIED = ("txt", "json", CLASS_LABEL)


@dataclass
class Encoded:
    """A view of a sample on its way into a shard.

    Attributes:
        image: uint8 [3, H, W]; None if the picture's file is kept.
        members: by extension, without the text's embedding and the latents.
    """

    key: str
    caption: str | None
    image: np.ndarray | None
    members: dict[str, Any]


class ShardEncoder:
    """Encodes shards.

    Args:
        captions: encodes captions; None copies the text and does not embed it.
        autoencoder: None keeps the files of pictures.
    """

    def __init__(
        self,
        captions: CaptionCache | None,
        autoencoder: Autoencoder | None,
        sample_format: SampleFormat,
        config: PrecomputeConfig,
    ) -> None:
        self.captions, self.autoencoder, self.format = captions, autoencoder, sample_format
        self.views = [
            View(place, flipped)
            for place in ([0.5] if config.crops == 1 else np.linspace(0, 1, config.crops).tolist())
            for flipped in ([False, True] if config.flips else [False])
        ]
        self.dtype = DTYPES[config.storage]
        self.keeps_distribution = config.latents is Latents.distribution

    def encode(self, shard: Path, target: Path) -> dict[str, dict[str, int]]:
        """Encode the samples of one shard; a caption's embedding is in the shard once, the other samples say where.

        Returns:
            ``offset`` and ``size`` of the sample with the embedding of each caption.
        """
        places: dict[str, dict[str, int]] = {}  # of captions in the shard
        with open_shard(target) as write:
            try:
                samples = self._open(shard)
            except NoSamplesError as error:  # others may have some
                logger.warning("Nothing of %s is encoded: %s", shard, error)
                return places
            step = max(BATCH // len(self.views), 1)
            for start in range(0, len(samples), step):
                batch = range(start, min(start + step, len(samples)))
                views = [view for index in batch for view in self._views(samples, index)]
                if self.captions is not None:
                    self.captions.add({view.caption for view in views if view.caption is not None})
                for view, latents in zip(views, self._latents(views), strict=True):
                    self._write(write, view, latents, places)
        return places

    def _open(self, shard: Path) -> ShardDataset:
        samples = ShardDataset(shard.parent, shards=[shard.name], sample_filter=self.format.filter)
        samples.bucketing = self.format.bucketing
        divided_by = self.format.bucketing if self.format.divides and self.autoencoder is not None else None
        samples.keep(self.format.takes, self.format.needed, divided_by)
        return samples

    def _views(self, samples: ShardDataset, index: int) -> list[Encoded]:
        """Return the views of a sample, none if it cannot be used; of several captions one, by the place in the shard."""
        try:
            key, contents = samples.contents(index)
            named = [*COPIED, *(source.member for source in self.format.captions)]
            members = samples.decoded(index, [name for name in named if name in contents])
            members.pop("__key__")
            caption = self.format.caption(members, index) if self.captions is not None else None
            kept = {name: members[name] for name in COPIED if name in members}
            kept |= {"txt": caption} if caption is not None else {}
            picture = next((name for name in IMAGES if name in contents), None)
            if picture is None:
                raise ValueError("its picture is not where the index has it")
            content = bytes(contents[picture])
            if self.autoencoder is None:
                return [Encoded(key, caption, None, kept | {picture: content})]
            encoded = []
            for name, view in self._distinct(samples, index):
                encoded.append(Encoded(f"{key}{name}", caption, None, dict(kept)))
                self._see(samples, index, content, view, encoded[-1])
            return encoded
        except (OSError, ValueError) as error:
            samples.warn(index, error)
            return []

    def _distinct(self, samples: ShardDataset, index: int) -> Iterator[tuple[str, View]]:
        """Yield the views of a picture that differ, and what each adds to the sample's key."""
        places = dict.fromkeys(view.place for view in self.views)
        seen = set()
        for view in self.views:
            bucket = self._bucket(samples, index)
            part = view.crop(*samples.size(index), bucket) if bucket is not None else None
            if (part, view.flipped) not in seen:
                seen.add((part, view.flipped))
                crop = f"-crop{list(places).index(view.place)}" if len(places) > 1 else ""
                yield crop + ("-flipped" if view.flipped else ""), view

    @staticmethod
    def _bucket(samples: ShardDataset, index: int) -> Bucket | None:
        bucketing = samples.bucketing
        return bucketing.buckets[samples.place(index)[0]] if bucketing is not None else None

    def _see(self, samples: ShardDataset, index: int, content: bytes, view: View, encoded: Encoded) -> None:
        """Give a view its image, and where it is not the middle of a square, say which part of the picture it is."""
        bucket, bucketing = self._bucket(samples, index), samples.bucketing
        try:
            encoded.image = decode_image(content, bucket, bucketing is not None and bucketing.upscale, view)
        except Exception as error:  # on damaged content the libraries raise nearly anything
            raise ValueError(str(error)) from error
        if bucket is not None and (self.format.divides or len(self.views) > 1):
            described = encoded.members.get("json")
            crop = asdict(view.crop(*samples.size(index), bucket)) | (
                {"flipped": True} if view.flipped else {}
            )
            encoded.members["json"] = (described if isinstance(described, dict) else {}) | {"crop": crop}

    def _latents(self, views: list[Encoded]) -> Iterator[dict[str, Tensor]]:
        """Yield the members with latents of views one after the other; neighbours of one size are encoded together."""
        if self.autoencoder is None:
            yield from ({} for _ in views)
            return
        images = [view.image for view in views if view.image is not None]
        for _, alike in groupby(images, lambda image: image.shape):
            batch = torch.from_numpy(np.stack(list(alike)))
            if self.keeps_distribution:
                for mean, log_variance in zip(*encode_distributions(self.autoencoder, batch), strict=True):
                    yield {LATENTS: mean, LOG_VARIANCE: log_variance}
            else:
                yield from ({LATENTS: mean} for mean in encode_images(self.autoencoder, batch))

    def _write(
        self,
        write: ShardWriter,
        view: Encoded,
        latents: dict[str, Tensor],
        places: dict[str, dict[str, int]],
    ) -> None:
        members = {name: tensor.to(self.dtype).cpu() for name, tensor in latents.items()}
        require_storable(members.items(), f"The sample {view.key}")
        if self.captions is None or view.caption is None:
            write(view.key, members | view.members)
        elif view.caption in places:
            write(view.key, members | view.members | {SHARED: places[view.caption]})
        else:
            hidden_states, pooled = self.captions.encoded[view.caption]
            members |= {TEXT_HIDDEN_STATES: hidden_states, TEXT_POOLED: pooled}
            offset, size = write(view.key, members | view.members)
            places[view.caption] = {"offset": offset, "size": size}
