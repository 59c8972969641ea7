"""What a run saw in one of its draws: ``rmoe data show``. Logs and diagnoses name draws by their numbers."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from rmoe_megatron import durable
from rmoe_megatron.config.loading import load_config
from rmoe_megatron.data.loader import find_draw
from rmoe_megatron.data.shards import CLASS_LABEL, ShardDataset, TrainingDataset
from rmoe_megatron.encoders.autoencoder import decode_latents, load_autoencoder
from rmoe_megatron.errors import UserError
from rmoe_megatron.pictures import png


@dataclass(frozen=True)
class Draw:
    """A training sample, where it lies, and its picture."""

    shard: Path
    key: str
    caption: str | None
    class_label: int | None
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
    out = out or run_dir / "draws" / f"draw-{draw:08d}.png"
    durable.check_writable(out.parent, "The folder of the picture")
    dataset = TrainingDataset(Path(config.data.train), config.model.num_classes)
    index, location = find_draw(dataset, config.data.shuffle, config.seed, draw)
    everything = ShardDataset(Path(config.data.train), shards=[location.shard])
    sample = next(
        everything[number] for number, each in enumerate(everything.locations) if each.key == location.key
    )
    if sample["__key__"] != location.key:
        raise UserError(f"The sample {location.key} of {location.shard} cannot be read; the log says why.")
    out.parent.mkdir(parents=True, exist_ok=True)
    durable.write(out, _picture(config.encoders.autoencoder, dataset, index))
    label = sample.get(CLASS_LABEL)
    return Draw(location.shard, location.key, sample.get("txt"), label, out)


def _picture(autoencoder_name: str, dataset: TrainingDataset, index: int) -> bytes:
    sample = dataset[index]
    if "image" in sample:
        return png(Image.fromarray(sample["image"].permute(1, 2, 0).numpy()))
    autoencoder = load_autoencoder(autoencoder_name, torch.device("cpu"))
    return png(Image.fromarray(decode_latents(autoencoder, sample["latents"].unsqueeze(0))[0].numpy()))
