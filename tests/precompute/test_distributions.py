"""Latents kept as distributions: what is stored is diffusers', and what is drawn depends on seed and draw alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from scipy import stats

from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.config.run import Latents, PrecomputeConfig, Storage
from rmoe_megatron.data.loader import BatchLayout, batches
from rmoe_megatron.data.mixture import Mixture
from rmoe_megatron.data.order import GlobalOrder
from rmoe_megatron.data.shards.bucketing import Bucketing
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.data.shards.index import LATENTS, LOG_VARIANCE
from rmoe_megatron.data.training_dataset import SampleFormat, TrainingDataset
from rmoe_megatron.errors import UserError
from rmoe_megatron.precompute.shard import ShardEncoder
from tests.support.commands import rmoe
from tests.support.runs import CONFIG, array, losses, write_shard

PICTURES = 5
FORMAT = SampleFormat(num_classes=3, bucketing=Bucketing((Bucket(16, 16),)))


def images() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (PICTURES, 3, 16, 16), dtype=np.uint8))


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    made = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, scaling_factor=0.6, shift_factor=0.1,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    ).eval()  # fmt: skip
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, autoencoder: AutoencoderKL) -> Path:
    folder = tmp_path_factory.mktemp("distributions")
    write_shard(
        folder / "source" / "0.tar",
        [{"png": encoded_png(image), "cls": b"1"} for image in images()],
    )
    for name in ("mean", "distribution"):
        (folder / name).mkdir()
        asked = PrecomputeConfig(latents=Latents(name))
        ShardEncoder(None, autoencoder, FORMAT, asked).encode(
            folder / "source" / "0.tar", folder / name / "0.tar"
        )
    return folder


def encoded_png(image: torch.Tensor) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="png")
    return buffer.getvalue()


def test_what_is_stored_is_diffusers_distribution_of_scaled_latents(
    folder: Path, autoencoder: AutoencoderKL
) -> None:
    with torch.no_grad():
        posterior = autoencoder.encode(images() / 127.5 - 1).latent_dist
    mean = (posterior.mean.double() - 0.1) * 0.6
    deviation = posterior.std.double() * 0.6
    stored = ShardDataset(folder / "distribution")
    for index in range(PICTURES):
        sample = stored[index]
        assert np.allclose(sample[LATENTS], mean[index], atol=2e-3)
        assert np.allclose(np.exp(sample[LOG_VARIANCE].astype(np.float64) / 2), deviation[index], rtol=3e-3)
    assert sorted(stored.members(0)) == sorted(["cls", LATENTS, LOG_VARIANCE])
    alone = ShardDataset(folder / "mean")
    assert sorted(alone.members(0)) == sorted(["cls", LATENTS])
    assert all(np.array_equal(alone[index][LATENTS], stored[index][LATENTS]) for index in range(PICTURES))


def test_draws_have_the_stored_mean_and_variance(folder: Path) -> None:
    dataset = TrainingDataset(folder / "distribution", FORMAT)
    stored = dataset.samples[2]
    drawn = torch.stack([dataset.draw(2, draw)["latents"] for draw in range(500)]).double().numpy()
    deviation = np.exp(stored[LOG_VARIANCE].astype(np.float64) / 2)
    standard = (drawn - stored[LATENTS].astype(np.float64)) / deviation
    assert stats.kstest(standard.ravel(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(standard.reshape(500, -1)[:, :40].T) - np.eye(40)
    assert np.abs(correlation).max() < 6 / 500**0.5


def drawn(
    folder: Path, first: int, micro_batch: int, ranks: int, workers: int = 0
) -> dict[int, torch.Tensor]:
    """Latents by draw, of draws ``first`` to 30 (three epochs of two sets) as ranks have them."""
    dataset = TrainingDataset(folder, FORMAT)
    found = {}
    for rank in range(ranks):
        order, layout = GlobalOrder(len(dataset), True, 0), BatchLayout(6, micro_batch, rank, ranks)
        for batch in batches(dataset, order, layout, first, 30, num_workers=workers):
            found |= dict(zip(batch["draw_index"].tolist(), batch["latents"], strict=True))
    return found


def test_a_draw_is_the_same_in_every_layout_and_after_a_resume_and_another_in_every_epoch(
    folder: Path,
) -> None:
    whole = drawn(folder / "distribution", 0, 6, 1)
    assert sorted(whole) == list(range(30))
    for found in (
        drawn(folder / "distribution", 0, 1, 3),
        drawn(folder / "distribution", 12, 3, 2),
        drawn(folder / "distribution", 0, 2, 1, workers=2),
    ):
        assert all(torch.equal(latents, whole[draw]) for draw, latents in found.items())
        assert found
    order = GlobalOrder(PICTURES, True, 0)
    by_sample: dict[int, list[torch.Tensor]] = {}
    for draw, latents in whole.items():
        by_sample.setdefault(order[draw], []).append(latents)
    for seen in by_sample.values():
        assert len(seen) == 6
        assert len({tuple(latents.flatten().tolist()) for latents in seen}) == 6
    other = TrainingDataset(folder / "distribution", replace(FORMAT, seed=1))
    assert not torch.equal(
        other.draw(0, 0)["latents"], TrainingDataset(folder / "distribution", FORMAT).draw(0, 0)["latents"]
    )


def test_sets_with_and_without_distributions_are_not_mixed(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from fractions import Fraction

    datasets = [TrainingDataset(folder / name, FORMAT) for name in ("mean", "distribution")]
    with pytest.raises(UserError, match="precomputed samples and .* precomputed as distributions ones"):
        Mixture(datasets, [Fraction(1), Fraction(1)])
    for number, name in enumerate(("mean", "distribution")):
        (tmp_path / f"{number}.tar").write_bytes((folder / name / "0.tar").read_bytes())
    dataset = TrainingDataset(tmp_path, FORMAT)
    assert len(dataset) == PICTURES
    assert "5 of the 10 samples" in caplog.text


def test_shapes_that_differ_make_a_bad_sample(tmp_path: Path) -> None:
    good = {"latents.npy": array(np.zeros((4, 2, 2))), LOG_VARIANCE: array(np.zeros((4, 2, 2))), "cls": b"1"}
    bad = good | {LOG_VARIANCE: array(np.zeros((4, 2, 1)))}
    write_shard(tmp_path / "0.tar", [good, bad])
    found: list[object] = []
    drawn = TrainingDataset(tmp_path, FORMAT).draw(1, 0, found)  # type: ignore[arg-type]
    assert drawn["latents"].shape == (4, 2, 2)
    assert len(found) == 1


@pytest.fixture(scope="module")
def config(folder: Path, autoencoder: AutoencoderKL) -> Path:
    autoencoder.save_pretrained(folder / "vae")
    for split in ("train", "val"):
        pictures = [{"png": encoded_png(image), "txt": b"x"} for image in images() for _ in range(4)]
        write_shard(folder / "raw" / split / "0.tar", pictures)
    text = CONFIG.replace("in_channels: 3", "in_channels: 4").format(folder=folder)
    (folder / "config.yaml").write_text(text + f"encoders: {{autoencoder: {folder}/vae}}\n")
    return folder / "config.yaml"


def test_a_run_on_distributions_is_resumed_exactly(config: Path) -> None:
    folder, out = config.parent, config.parent / "encoded"
    settings = ["data.precompute.latents=distribution"]
    code, errors = rmoe("data", "precompute", str(config), str(folder / "raw"), str(out), *settings)
    assert code == 0, errors

    def train(name: str, steps: int) -> dict[int, float]:
        code, errors = rmoe(
            "train", str(config), f"run_dir={folder}/{name}", f"data.train={out}/train", f"data.validation={out}/val",
            f"training.steps={steps}", "training.validate_every=100", "training.sample_prompts=[]", "checkpoint.every=2",
            "optimizer.warmup_steps=1", "optimizer.min_learning_rate=1.0e-3",
        )  # fmt: skip
        assert code == 0, errors
        return losses(folder / name)

    whole = train("whole", 4)
    train("parts", 2)
    code, errors = rmoe("train", "--resume", f"{folder}/parts", "training.steps=4")
    assert code == 0, errors
    assert losses(folder / "parts") == whole


def test_bfloat16_keeps_the_distribution_too(
    folder: Path, autoencoder: AutoencoderKL, tmp_path: Path
) -> None:
    asked = PrecomputeConfig(latents=Latents.distribution, storage=Storage.bfloat16)
    ShardEncoder(None, autoencoder, FORMAT, asked).encode(folder / "source" / "0.tar", tmp_path / "0.tar")
    finer = TrainingDataset(folder / "distribution", FORMAT).draw(1, 7)["latents"]
    coarser = TrainingDataset(tmp_path, FORMAT).draw(1, 7)["latents"]
    assert coarser.dtype == torch.float32
    assert torch.allclose(coarser, finer, rtol=0.05, atol=0.05)
