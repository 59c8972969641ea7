"""What precomputed samples hold: views of pictures, one embedding for equal captions, 16 bits of either kind; and who made it."""

import io
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.config.run import Latents, PrecomputeConfig, Storage
from rmoe_megatron.data.mixture import Mixture
from rmoe_megatron.data.shards.bucketing import Bucketing
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.data.shards.index import LATENTS, SHARED
from rmoe_megatron.data.training_dataset import SampleFormat, TrainingDataset
from rmoe_megatron.errors import UserError
from rmoe_megatron.hf.caption_encoder import TextEmbeddings
from rmoe_megatron.hf.pixel_codec import PixelCodec
from rmoe_megatron.precompute.captions import CaptionCache
from rmoe_megatron.precompute.shard import ShardEncoder
from tests.precompute.test_job import CountingEncoder
from tests.support.commands import rmoe
from tests.support.runs import CONFIG, losses, write_shard

CAPTIONS = ["one", "three", "one", "seventeen", "three"]
SQUARE = SampleFormat(bucketing=Bucketing((Bucket(8, 8),)))


def gradient(width: int, height: int) -> Image.Image:
    columns = np.linspace(0, 255, width).round().astype(np.uint8)
    return Image.fromarray(np.broadcast_to(columns[None, :, None], (height, width, 3)).copy())


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    gradient(width, height).save(buffer, format="png")
    return buffer.getvalue()


def encode(
    folder: Path, asked: PrecomputeConfig, autoencoder: bool = True, width: int = 24
) -> CountingEncoder:
    """Encode five pictures with three different captions into ``folder``."""
    samples = [{"png": png(width, 8), "txt": text.encode(), "json": b'{"score": 1}'} for text in CAPTIONS]
    write_shard(folder / "source" / "0.tar", samples)
    (folder / "out").mkdir()
    encoder = CountingEncoder()
    dtype = torch.bfloat16 if asked.storage is Storage.bfloat16 else torch.float16
    codec = PixelCodec() if autoencoder else None
    ShardEncoder(CaptionCache(encoder, dtype), codec, SQUARE, asked).encode(
        folder / "source" / "0.tar", folder / "out" / "0.tar"
    )
    return encoder


def test_equal_captions_are_encoded_and_stored_once(tmp_path: Path) -> None:
    encoder = encode(tmp_path, PrecomputeConfig())
    assert encoder.asked == [["one", "three", "seventeen"]]
    samples = ShardDataset(tmp_path / "out")
    kinds = [SHARED in samples.members(index) for index in range(5)]
    assert kinds == [False, False, True, False, True]
    dataset = TrainingDataset(tmp_path / "out", SQUARE)
    assert len(dataset) == 5
    for index, caption in enumerate(CAPTIONS):
        drawn = dataset.draw(index, 0)
        assert (drawn["text_hidden_states"] == len(caption)).all()
        assert (drawn["text_pooled"] == len(caption)).all()
        assert samples[index]["txt"] == caption
    # Stored once: the embedding takes 144 bytes and more of each sample that has its own.
    assert samples.index.records["size"][2] < samples.index.records["size"][0]


@pytest.mark.parametrize(
    "place",
    [
        b"[]",
        b'{"offset": -1, "size": 5}',
        b'{"offset": 0, "size": 99999}',
        b'{"offset": 3, "size": 600}',
        b"{",
    ],
)
def test_a_damaged_reference_is_a_bad_sample(tmp_path: Path, place: bytes) -> None:
    encode(tmp_path, PrecomputeConfig())
    good = ShardDataset(tmp_path / "out")
    _, contents = good.contents(0)
    whole = {name: bytes(content) for name, content in contents.items()}
    shared = {LATENTS: whole[LATENTS], SHARED: place}
    (tmp_path / "damaged").mkdir()
    write_shard(tmp_path / "damaged" / "0.tar", [whole, shared])
    dataset = TrainingDataset(tmp_path / "damaged", SQUARE)
    bad: list[object] = []
    dataset.draw(1, 0, bad)  # type: ignore[arg-type]
    assert len(bad) == 1


def test_bfloat16_is_kept_to_the_bit(tmp_path: Path) -> None:
    encode(tmp_path, PrecomputeConfig(storage=Storage.bfloat16))
    drawn = TrainingDataset(tmp_path / "out", SQUARE).draw(0, 0)
    assert {value.dtype for value in drawn.values()} == {torch.bfloat16}
    pixels = torch.from_numpy(np.asarray(gradient(24, 8).crop((8, 0, 16, 8)))).permute(2, 0, 1)
    expected = ((pixels / 127.5 - 1 + 0.55) * 2.5).to(torch.bfloat16)
    assert (drawn["latents"].float() - expected.float()).abs().max() <= 2**-7


def test_crops_and_flips_are_samples_of_their_own(tmp_path: Path) -> None:
    encode(tmp_path, PrecomputeConfig(crops=3, flips=True))
    samples = ShardDataset(tmp_path / "out")
    assert len(samples) == 5 * 6
    keys = [samples.name(index) for index in range(6)]
    assert keys == [f"000000-crop{crop}{flip}" for crop in range(3) for flip in ("", "-flipped")]
    assert [samples[index]["json"]["crop"]["left"] for index in range(6)] == [0, 0, 8, 8, 16, 16]
    assert samples[1]["json"] == {
        "score": 1,
        "crop": {"left": 0, "top": 0, "width": 8, "height": 8, "flipped": True},
    }
    latents = [samples[index][LATENTS] for index in range(6)]
    for crop in range(3):
        pixels = np.asarray(gradient(24, 8).crop((8 * crop, 0, 8 * crop + 8, 8))).transpose(2, 0, 1)
        expected = (pixels / 127.5 - 1 + 0.55) * 2.5
        assert np.abs(latents[2 * crop] - expected).max() < 2e-3
        assert np.array_equal(latents[2 * crop + 1], latents[2 * crop][:, :, ::-1])
    assert sum(SHARED in samples.members(index) for index in range(30)) == 27  # three captions


def test_a_picture_that_fits_has_one_crop(tmp_path: Path) -> None:
    encode(tmp_path, PrecomputeConfig(crops=3, flips=True), width=8)
    samples = ShardDataset(tmp_path / "out")
    assert [samples.name(index) for index in range(4)] == [
        "000000-crop0", "000000-crop0-flipped", "000001-crop0", "000001-crop0-flipped",
    ]  # fmt: skip


def test_a_shard_without_a_usable_sample_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shard(tmp_path / "in" / "0.tar", [{"png": png(4, 4), "txt": b"small"}, {"json": b"{}"}])
    write_shard(tmp_path / "in" / "1.tar", [{"png": png(8, 8), "txt": b"fits"}])
    divided = SampleFormat(bucketing=Bucketing((Bucket(8, 8),)), divides=True)
    encoder = ShardEncoder(CaptionCache(CountingEncoder()), PixelCodec(), divided, PrecomputeConfig())
    (tmp_path / "out").mkdir()
    for name in ("0.tar", "1.tar"):
        encoder.encode(tmp_path / "in" / name, tmp_path / "out" / name)
    assert "Nothing of" in caplog.text
    assert "1 are smaller than their bucket" in caplog.text
    assert len(TrainingDataset(tmp_path / "out", divided)) == 1


def test_pictures_may_stay_as_they_are(tmp_path: Path) -> None:
    encode(tmp_path, PrecomputeConfig(latents=Latents.none), autoencoder=False)
    dataset = TrainingDataset(tmp_path / "out", SQUARE)
    assert (dataset.precomputed, dataset.has_text) == (False, True)
    assert bytes(dataset.samples.contents(2)[1]["png"]) == png(24, 8)
    drawn = dataset.draw(2, 0)
    assert drawn["image"].shape == (3, 8, 8)
    assert (drawn["text_pooled"] == len(CAPTIONS[2])).all()
    raw = TrainingDataset(tmp_path / "source", SQUARE)
    with pytest.raises(UserError, match="raw, with embedded text, samples and .* raw ones"):
        Mixture([dataset, raw], [Fraction(1), Fraction(1)])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embeddings")
    for split, first in (("train", 0), ("val", 50)):
        pictures = [
            {"png": png(8 + number, 8), "txt": f"number {number % 5}".encode()}
            for number in range(first, first + 16)
        ]
        write_shard(folder / "data" / split / "0.tar", pictures)
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    return folder / "config.yaml"


def prepared(config: Path, name: str, *settings: str) -> list[str]:
    out = config.parent / name
    code, errors = rmoe("data", "precompute", str(config), str(config.parent / "data"), str(out), *settings)
    assert code == 0, errors
    return [f"data.train={out}/train", f"data.validation={out}/val"]


def trained(config: Path, name: str, *settings: str) -> list[float]:
    short = ["training.steps=4", "training.validate_every=4", "training.sample_prompts=[]"]
    code, errors = rmoe("train", str(config), f"run_dir={config.parent}/{name}", *short, *settings)
    assert code == 0, errors
    return [*losses(config.parent / name).values(), *losses(config.parent / name, "validation_loss").values()]


def test_every_way_of_precomputing_trains_alike(config: Path) -> None:
    raw = trained(config, "raw")
    for name, settings, tolerance in (
        ("float16", [], 2e-3),
        ("bfloat16", ["data.precompute.storage=bfloat16"], 2e-2),
        ("text", ["data.precompute.latents=none"], 2e-3),
    ):
        found = trained(config, f"on-{name}", *prepared(config, name, *settings))
        assert found == pytest.approx(raw, rel=tolerance), name


def test_a_run_with_other_encoders_is_refused(config: Path) -> None:
    folders = prepared(config, "made")
    path = config.parent / "made" / "dataset.json"
    described = json.loads(path.read_text())
    assert described["encoders"]["autoencoder_sha256"] == "pixel"
    assert len(described["encoders"]["text_encoder_sha256"]) == 64
    for key, value, complaint in (
        ("text_encoder_sha256", "0" * 64, "precomputed with text_encoder 'minilm' of other weights"),
        ("autoencoder_sha256", "0" * 64, "precomputed with autoencoder 'pixel' of other weights"),
        ("text_encoders_dropped", ["t5"], "precomputed with text_encoders_dropped ['t5']"),
    ):
        changed = {**described, "encoders": {**described["encoders"], key: value}}
        path.write_text(json.dumps(changed))
        code, errors = rmoe("train", str(config), f"run_dir={config.parent}/refused", *folders)
        assert code == 2, errors
        assert complaint in errors
        assert "Traceback" not in errors
    path.write_text(json.dumps({"name": "without encoders"}))
    assert trained(config, "of-others", *folders)


def test_who_has_nothing_to_do_loads_nothing(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rmoe_megatron.config.loading import load_config
    from rmoe_megatron.precompute import job

    loaded = load_config(config, [])
    out = config.parent / "in-two-parts"
    assert not job.precompute(loaded, config.parent / "data", out, (0, 2))
    monkeypatch.setattr(job, "load_text_encoder", lambda *_: pytest.fail("an encoder is loaded"))
    assert not job.precompute(loaded, config.parent / "data", out, (0, 2))


@pytest.mark.parametrize("scale", [1.0, 1e5])
@pytest.mark.parametrize("storage", [Storage.float16, Storage.bfloat16])
def test_values_beyond_the_storage_are_refused_by_name(
    tmp_path: Path, storage: Storage, scale: float
) -> None:
    """float16 ends at 65504; bfloat16 has float32's range."""
    samples = [{"png": png(8, 8), "txt": text.encode()} for text in CAPTIONS]
    write_shard(tmp_path / "0.tar", samples)
    asked = PrecomputeConfig(storage=storage)
    dtype = {Storage.float16: torch.float16, Storage.bfloat16: torch.bfloat16}[storage]
    for what, codec_scale, text_scale in (("latents", scale, 1.0), ("text", 1.0, scale)):
        codec = PixelCodec(scaling_factor=2.5 * codec_scale)
        encoder = ScaledEncoder(text_scale)
        encoding = ShardEncoder(CaptionCache(encoder, dtype), codec, SQUARE, asked)
        target = tmp_path / f"{what}.tar"
        if scale == 1.0 or storage is Storage.bfloat16:
            encoding.encode(tmp_path / "0.tar", target)
            continue
        words = (
            "The sample .* values in latents"
            if what == "latents"
            else "The caption .* values in its token states"
        )
        with pytest.raises(
            UserError, match=f"{words}.* that are not finite in float16; set data.precompute.storage=bfloat16"
        ):
            encoding.encode(tmp_path / "0.tar", target)


class ScaledEncoder(CountingEncoder):
    """Gives token states of any size."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def encode(self, captions: list[str]) -> TextEmbeddings:
        encoded = super().encode(captions)
        return TextEmbeddings(torch.full_like(encoded.hidden_states, self.scale), encoded.pooled)
