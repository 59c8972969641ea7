"""What a run saw in one of its draws: ``rmoe data show``. Logs and diagnoses name draws by their numbers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from rmoe_megatron import durable
from rmoe_megatron.config.bounds import check_bounds
from rmoe_megatron.config.loading import load_config
from rmoe_megatron.data.order import GlobalOrder
from rmoe_megatron.data.samples import CLASS_LABEL, TrainingDataset
from rmoe_megatron.data.shards import SampleLocation, ShardDataset
from rmoe_megatron.encoders.autoencoder import decode_latents, load_autoencoder
from rmoe_megatron.errors import UserError
from rmoe_megatron.pictures import png
from rmoe_megatron.training.preflight import sample_format


@dataclass(frozen=True)
class Draw:
    """A training sample, where it lies, what it says, and its picture."""

    shard: Path
    key: str
    caption: str | None
    class_label: int | None
    is_finite: bool  # false for latents with NaN or infinity, which are black in the picture
    picture: Path


def show_draw(run_dir: Path, draw: int, overrides: list[str], out: Path | None = None) -> Draw:
    """Find the sample of a run's ``draw`` and save its picture; latents are decoded with the run's autoencoder.

    Args:
        overrides: settings over the run's own, for data that have moved.
        out: PNG to write; None writes it below the run's folder.

    Raises:
        UserError: there is no such run, its data are gone, or the sample cannot be read.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"There is no run at {run_dir} (no config.yaml); give the run_dir of an earlier run.")
    config = load_config(run_dir / "config.yaml", overrides)
    check_bounds(config)
    out = out or run_dir / "draws" / f"draw-{draw:08d}.png"
    durable.check_writable(out.parent, "The folder of the picture")
    dataset = TrainingDataset(Path(config.data.train), sample_format(config))
    order = GlobalOrder(len(dataset), config.data.shuffle, config.seed)
    index = order[draw]
    location = dataset.samples.locate(index)
    if dataset.samples[index]["__key__"] != location.key:
        raise UserError(
            f"The sample {location.key} of {location.shard} cannot be read (the log says why); training takes the next "
            "readable one in its place."
        )
    said = _members(location, ["txt", CLASS_LABEL])
    image, is_finite = _image(dataset.draw(index, draw), config.encoders.autoencoder)
    out.parent.mkdir(parents=True, exist_ok=True)
    durable.write(out, png(image))
    return Draw(location.shard, location.key, said.get("txt"), said.get(CLASS_LABEL), is_finite, out)


def _members(location: SampleLocation, extensions: list[str]) -> dict[str, Any]:
    """Return those members of a sample that it has; training may not read them."""
    wanted = [extension for extension in extensions if extension in location.members]
    if not wanted:
        return {}
    shard = ShardDataset(location.shard.parent, wanted, shards=[location.shard])
    index = next(number for number in range(len(shard)) if shard.locate(number).key == location.key)
    return shard[index]


def _image(sample: dict[str, Any], autoencoder_name: str) -> tuple[Image.Image, bool]:
    if "image" in sample:
        return Image.fromarray(sample["image"].permute(1, 2, 0).numpy()), True
    latents = sample["latents"].float().unsqueeze(0)
    autoencoder = load_autoencoder(autoencoder_name, torch.device("cpu"))
    finite = latents.isfinite()
    pixels = decode_latents(autoencoder, torch.where(finite, latents, latents.new_tensor(-1e3)))
    return Image.fromarray(pixels[0].numpy()), bool(finite.all())
