"""Precomputation of shards: where the output may lie, and what of a source can be encoded."""

import io
import logging
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from rmoe_megatron.cli.options import parse_part
from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.config.model import DiffusionConfig, Objective
from rmoe_megatron.config.run import PrecomputeConfig, RunConfig, Storage
from rmoe_megatron.data.shards.bucketing import Bucketing
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.data.shards.index import LATENTS
from rmoe_megatron.data.training_dataset import SampleFormat, TrainingDataset
from rmoe_megatron.encoders.autoencoder import encode_images
from rmoe_megatron.encoders.text import TextEmbeddings
from rmoe_megatron.errors import UserError
from rmoe_megatron.hf.pixel_codec import PixelCodec
from rmoe_megatron.precompute.captions import CaptionCache
from rmoe_megatron.precompute.job import precompute
from rmoe_megatron.precompute.shard import ShardEncoder
from rmoe_megatron.precompute.sources import Records, ShardSource
from rmoe_megatron.precompute.stored_captions import StoredCaptions
from tests.data.test_shards import picture, png
from tests.support.configurations import MODEL, tiny_config
from tests.support.ranks import DIT
from tests.support.runs import write_shard


@pytest.mark.parametrize(("source", "out"), [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a", "c/../a/b")])
def test_source_and_output_lie_apart(tmp_path: Path, source: str, out: str) -> None:
    (tmp_path / "c").mkdir()
    write_shard(tmp_path / source / "a.tar", [{"png": png(1), "txt": b"x"}])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="overlap"):
        precompute(tiny_config(), tmp_path / source, tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before


def test_samples_that_cannot_be_encoded_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, target = tmp_path / "source.tar", tmp_path / "encoded.tar"
    samples = [{"png": png(value), "cls": b"1"} for value in (0, 128, 255)]
    write_shard(source, [*samples, {"cls": b"1"}, {"png": picture("png", "RGB", 3), "cls": b"1"}])
    with caplog.at_level(logging.WARNING):
        taken = SampleFormat(num_classes=2, bucketing=Bucketing((Bucket(4, 4),)))
        ShardEncoder(None, PixelCodec(), taken, PrecomputeConfig()).encode(source, target)
    encoded = ShardDataset(tmp_path, shards=["encoded.tar"])
    assert [encoded.name(index) for index in range(len(encoded))] == ["000000", "000001", "000002"]
    with tarfile.open(target) as tar:
        names = tar.getnames()
    assert len(names) == len(set(names)) == 6  # nothing is written twice in the place of what cannot be read
    for index, value in enumerate((0, 128, 255)):
        expected = np.full((3, 4, 4), (value / 127.5 - 1 + 0.55) * 2.5, dtype=np.float16)
        assert np.allclose(encoded[index][LATENTS], expected, rtol=1e-3)
    assert "1 of the 5 samples" in caplog.text
    assert "Sample 000004" in caplog.text


def test_long_names_are_kept(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "source.tar", "w") as tar:
        for extension, content in (("png", png(1)), ("cls", b"1")):
            header = tarfile.TarInfo(f"{'long' * 50}.{extension}")
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    ShardEncoder(None, PixelCodec(), SampleFormat(num_classes=2), PrecomputeConfig()).encode(
        tmp_path / "source.tar", tmp_path / "encoded.tar"
    )
    assert ShardDataset(tmp_path, shards=["encoded.tar"])[0]["__key__"] == "long" * 50


def toy(folder: Path, shards: int = 3) -> tuple[RunConfig, Path]:
    """A class-conditional configuration, which needs no text encoder, and raw shards for it."""
    model = replace(DIT, sample_size=4)
    config = tiny_config(None, model=model, diffusion=DiffusionConfig(objective=Objective.ddpm))
    for number in range(shards):
        samples = [{"png": png(number * 50 + sample), "cls": b"1"} for sample in range(2)]
        write_shard(folder / "source" / "train" / f"{number}.tar", samples)
    return config, folder / "source"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_parts_make_what_one_process_makes_and_the_last_publishes(tmp_path: Path) -> None:
    config, source = toy(tmp_path)
    assert precompute(config, source, tmp_path / "whole")
    out = tmp_path / "parts"
    assert not precompute(config, source, out, (1, 2))
    assert not out.exists()
    assert precompute(config, source, out, (0, 2))
    assert contents(out) == contents(tmp_path / "whole")
    assert len(contents(out)) == 5  # three shards, dataset.json, sources.jsonl
    assert not list(tmp_path.glob(".*"))
    assert precompute(config, source, out, (1, 2))  # asked for again after the others: nothing is left to do
    assert contents(out) == contents(tmp_path / "whole")


def test_ranks_share_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, source = toy(tmp_path, shards=5)
    found: list[str] = []
    monkeypatch.setattr(
        "rmoe_megatron.precompute.shard.ShardEncoder.encode",
        lambda self, shard, target: found.append(shard.stem) or target.touch(),
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    for rank in (0, 1):
        for part in (0, 1):
            monkeypatch.setenv("RANK", str(rank))
            is_last = (rank, part) == (1, 1)
            assert precompute(config, source, tmp_path / "out", (part, 2)) == is_last
    assert found == ["0", "4", "2", "1", "3"]


def test_what_a_killed_attempt_finished_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, source = toy(tmp_path)
    out, encoded = tmp_path / "out", []

    def die_at_the_second(self: ShardEncoder, shard: Path, target: Path) -> None:
        encoded.append(shard.stem)
        target.write_bytes(b"torn" if shard.stem == "1" else b"whole")
        if shard.stem == "1":
            raise KeyboardInterrupt

    monkeypatch.setattr("rmoe_megatron.precompute.shard.ShardEncoder.encode", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        precompute(config, source, out)
    monkeypatch.setattr(
        "rmoe_megatron.precompute.shard.ShardEncoder.encode",
        lambda self, shard, target: encoded.append(shard.stem) or target.touch(),
    )
    other = replace(
        config, encoders=replace(config.encoders, autoencoder="pixel"), model=replace(config.model)
    )
    (source / "dataset.json").write_text('{"name": "another"}')
    with pytest.raises(UserError, match="unfinished precomputation"):
        precompute(other, source, out)
    (source / "dataset.json").unlink()
    assert precompute(config, source, out)
    assert encoded == ["0", "1", "1", "2"]
    assert (out / "train" / "0.tar").read_bytes() == b"whole"


@pytest.mark.parametrize("part", ["", "1", "2/2", "-1/2", "a/b", "0/0", "1/2/3"])
def test_a_part_that_is_none(part: str) -> None:
    with pytest.raises(UserError, match="--part"):
        parse_part(part)


class CountingEncoder:
    """A text encoder whose embedding of a caption is its length, and that remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def encode(self, captions: list[str]) -> TextEmbeddings:
        self.asked.append(captions)
        lengths = torch.tensor([float(len(caption)) for caption in captions])
        return TextEmbeddings(lengths[:, None, None].repeat(1, 4, 8), lengths[:, None].repeat(1, 8))


def test_the_caption_cache_keeps_the_latest_within_its_bytes() -> None:
    encoder = CountingEncoder()
    one = 2 * (4 * 8 + 8)  # bytes of a caption
    cache = CaptionCache(encoder, max_bytes=3 * one)
    cache.add({"a", "bb"})
    cache.add({"a", "ccc"})
    assert encoder.asked == [["a", "bb"], ["ccc"]]
    assert cache.bytes == 3 * one
    cache.add({"dddd", "bb"})
    assert list(cache.encoded) == ["bb", "ccc", "dddd"]  # the oldest that is not asked for has gone
    assert cache.bytes == 3 * one
    many = {"e" * length for length in range(5, 12)}
    cache.add(many)  # a batch is kept whole, and nothing beside it
    assert set(cache.encoded) == many
    cache.add({"a"})
    assert encoder.asked[-1] == ["a"]
    assert len(cache.encoded) == 3
    states, pooled = cache.encoded["a"]
    assert (states == 1).all()
    assert (pooled == 1).all()
    assert states.untyped_storage().nbytes() == 2 * 4 * 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_captions_that_repeat_in_other_shards_are_read_again_not_encoded(
    tmp_path: Path, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """The memory takes what one shard has, and the third shard has the captions of the first."""
    captions = [["a", "bb"], ["ccc", "dddd"], ["bb", "a"]]
    encoder, taken = CountingEncoder(), SampleFormat(bucketing=Bucketing((Bucket(4, 4),)))
    stored = StoredCaptions(tmp_path / "out")
    cache = CaptionCache(encoder, dtype, stored, max_bytes=2 * (4 * 8 + 8))
    storage = Storage.float16 if dtype is torch.float16 else Storage.bfloat16
    encoding = ShardEncoder(cache, PixelCodec(), taken, PrecomputeConfig(storage=storage))
    (tmp_path / "out").mkdir()
    for number, texts in enumerate(captions):
        source, target = (tmp_path / folder / f"{number}.tar" for folder in ("in", "out"))
        write_shard(source, [{"png": png(1), "txt": text.encode()} for text in texts])
        stored.put(f"{number}.tar", encoding.encode(source, target))
    assert encoder.asked == [["a", "bb"], ["ccc", "dddd"]]
    samples = TrainingDataset(tmp_path / "out", taken)
    for index, text in enumerate([text for texts in captions for text in texts]):
        drawn = samples.draw(index, 0)
        assert drawn["text_pooled"].dtype == dtype
        assert (drawn["text_pooled"] == len(text)).all()
        assert (drawn["text_hidden_states"] == len(text)).all()
    for shard in (tmp_path / "out").glob("*.tar"):
        shard.unlink()
    with caplog.at_level(logging.WARNING):
        cache.add({"ccc"})
    assert encoder.asked[2:] == [["ccc"]]
    assert "cannot be read again" in caplog.text


def encode_shard(folder: Path, number: int, captions: list[str]) -> list[str]:
    """Encode a shard as a process of its own does; returns the captions that its encoder was asked for."""
    encoder, stored = CountingEncoder(), StoredCaptions(folder / "out")
    taken = SampleFormat(bucketing=Bucketing((Bucket(4, 4),)))
    encoding = ShardEncoder(CaptionCache(encoder, stored=stored), PixelCodec(), taken, PrecomputeConfig())
    (folder / "out").mkdir(exist_ok=True)
    source, target = (folder / name / f"{number}.tar" for name in ("in", "out"))
    write_shard(source, [{"png": png(1), "txt": text.encode()} for text in captions])
    stored.put(target.name, encoding.encode(source, target))
    drawn = TrainingDataset(folder / "out", taken, shards=[target.name])
    for index, text in enumerate(captions):
        assert (drawn.draw(index, 0)["text_hidden_states"] == len(text)).all()
    return [caption for asked in encoder.asked for caption in asked]


def test_what_another_process_has_encoded_is_read(tmp_path: Path) -> None:
    assert encode_shard(tmp_path, 0, ["a", "bb"]) == ["a", "bb"]
    assert encode_shard(tmp_path, 1, ["bb", "ccc"]) == ["ccc"]
    assert encode_shard(tmp_path, 2, ["ccc", "bb"]) == []
    # The first shard is made anew, with a text of another length in the place of "a": nobody takes it for that one.
    places = {path.name: path.read_bytes() for path in (tmp_path / "out" / ".captions").iterdir()}
    encode_shard(tmp_path, 0, ["dddd", "bb"])
    for name, content in places.items():
        (tmp_path / "out" / ".captions" / name).write_bytes(content)
    assert encode_shard(tmp_path, 3, ["a"]) == ["a"]


@pytest.mark.parametrize("content", [b"", b"PK", b"[]"])
def test_places_that_are_damaged_cost_time_alone(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    encode_shard(tmp_path, 0, ["a"])
    (path,) = (tmp_path / "out" / ".captions").iterdir()
    path.write_bytes(content)
    assert encode_shard(tmp_path, 1, ["a"]) == ["a"]
    assert "its captions may be encoded again" in caplog.text


def test_the_ranks_of_a_job_encode_a_caption_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        samples = [{"png": png(1), "txt": f"caption {each}".encode()} for each in (number, 0, 4)]
        write_shard(tmp_path / "source" / f"{number}.tar", samples)
    encoder, config = CountingEncoder(), tiny_config(model=replace(MODEL, sample_size=4))
    monkeypatch.setattr("rmoe_megatron.precompute.job.load_text_encoder", lambda *_: encoder)
    for key, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    put, unfinished = Records.put, tmp_path / ".out.partial"

    def put_last(records: Records, record: ShardSource) -> None:
        """After the last record another process may publish the set, and nothing may be written any more."""
        before = (
            len(list((unfinished / ".sources").glob("*.json"))) if (unfinished / ".sources").exists() else 0
        )
        assert len(list((unfinished / ".captions").glob("*.npz"))) == before + 1
        put(records, record)

    monkeypatch.setattr(Records, "put", put_last)
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert precompute(config, tmp_path / "source", tmp_path / "out") == (rank == 1)
    asked = [caption for each in encoder.asked for caption in each]
    assert sorted(asked) == ["", *(f"caption {number}" for number in range(5))]
    assert not list((tmp_path / "out").glob(".*"))


def test_an_autoencoder_sees_few_large_images_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    ).eval()  # fmt: skip
    images = torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8)
    whole = encode_images(autoencoder, images)
    seen: list[int] = []
    encode = AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, x: seen.append(len(x)) or encode(self, x))
    monkeypatch.setattr("rmoe_megatron.encoders.autoencoder.PIXELS_AT_ONCE", 3 * 16 * 16)
    assert torch.allclose(encode_images(autoencoder, images), whole, atol=1e-5)
    monkeypatch.setattr("rmoe_megatron.encoders.autoencoder.PIXELS_AT_ONCE", 1)
    assert torch.allclose(encode_images(autoencoder, images), whole, atol=1e-5)
    assert seen == [3, 3, 1, *[1] * 7]


def test_an_image_beyond_the_bound_is_encoded_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    ).eval()  # fmt: skip
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    whole = encode_images(autoencoder, images)
    largest: list[int] = []
    autoencoder.encoder.register_forward_pre_hook(lambda _, inputs: largest.append(inputs[0][0, 0].numel()))
    monkeypatch.setattr("rmoe_megatron.encoders.autoencoder.PIXELS_AT_ONCE", 16 * 16)
    tiled = encode_images(autoencoder, images)
    assert max(largest) <= 16 * 16
    assert tiled.shape == whole.shape == (2, 4, 16, 24)
    assert not autoencoder.use_tiling
    with torch.no_grad():
        expected = autoencoder.tiled_encode(images[:1] / 127.5 - 1).latent_dist.mode()
    assert torch.allclose(tiled[:1], expected * autoencoder.config.scaling_factor, atol=1e-5)
