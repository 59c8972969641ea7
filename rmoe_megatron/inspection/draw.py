"""What a run saw in one of its draws: ``rmoe data show``. Logs and diagnoses name draws by their numbers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from rmoe_megatron.config.bounds import check_bounds
from rmoe_megatron.config.loading import load_config
from rmoe_megatron.data.training_dataset import CLASS_LABEL, BadSample
from rmoe_megatron.encoders.autoencoder import decode_latents, load_autoencoder
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.images import png
from rmoe_megatron.input_pipeline.draws import locate, open_draws


@dataclass(frozen=True)
class Draw:
    """A training sample, where it lies, what it says, and its picture."""

    shard: str
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
    atomic.check_writable(out.parent, "The folder of the picture")
    dataset, index = locate(open_draws(config, with_validation=False), draw)
    bad = list[BadSample]()
    seen = dataset.draw(index, draw, bad)
    if bad:
        raise UserError(
            f"The sample {bad[0].key} of {bad[0].shard} cannot be read ({bad[0].reason}); training takes the next readable one "
            "in its place."
        )
    stored = dataset.samples.decoded(index, ["txt", CLASS_LABEL])
    image, is_finite = _image(seen, config.encoders.autoencoder)
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(out, png(image))
    return Draw(
        dataset.samples.shard(index),
        stored["__key__"],
        seen.get("caption", stored.get("txt")),
        stored.get(CLASS_LABEL),
        is_finite,
        out,
    )


def _image(sample: dict[str, Any], autoencoder_name: str) -> tuple[Image.Image, bool]:
    if "image" in sample:
        return Image.fromarray(sample["image"].permute(1, 2, 0).numpy()), True
    latents = sample["latents"].float().unsqueeze(0)
    autoencoder = load_autoencoder(autoencoder_name, torch.device("cpu"))
    finite = latents.isfinite()
    pixels = decode_latents(autoencoder, torch.where(finite, latents, latents.new_tensor(-1e3)))
    return Image.fromarray(pixels[0].numpy()), bool(finite.all())
