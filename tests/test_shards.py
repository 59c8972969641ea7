"""Shards and their order: the same samples as webdataset reads, any layout, any starting point, damage survived."""

import io
import logging
import pickle
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from rmoe_megatron.data.loader import BatchLayout, GlobalOrder, batches
from rmoe_megatron.data.shards import ShardDataset, TrainingDataset
from rmoe_megatron.errors import UserError
from tests.runs import array, write_shard


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(buffer, format="png")
    return buffer.getvalue()


def write_images(folder: Path, shards: int = 2, samples: int = 6) -> None:
    for shard in range(shards):
        content = [
            {"png": png(10 * shard + index), "txt": f"caption {shard} {index}".encode()}
            for index in range(samples)
        ]
        write_shard(folder / f"part-{shard:03d}.tar", content)


def test_samples_equal_those_webdataset_reads(tmp_path: Path) -> None:
    write_images(tmp_path)
    ours = ShardDataset(tmp_path, ["png", "txt"])
    urls = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(ours) == len(theirs) == 12
    for index, sample in enumerate(theirs):
        assert ours[index]["txt"] == sample["txt"]
        assert np.array_equal(ours[index]["png"], sample["png"].transpose(2, 0, 1))


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 8), (1, 2), (2, 2), (2, 4), (4, 1)])
def test_a_step_draws_the_same_samples_in_every_layout(tmp_path: Path, ranks: int, micro_batch: int) -> None:
    write_images(tmp_path)
    dataset = TrainingDataset(tmp_path)
    order = GlobalOrder(len(dataset), shuffle=True, seed=1)
    whole = list(islice(batches(dataset, order, BatchLayout(8, 8, 0, 1)), 4))
    per_rank = [
        list(
            islice(
                batches(dataset, order, BatchLayout(8, micro_batch, rank, ranks)),
                4 * 8 // ranks // micro_batch,
            )
        )
        for rank in range(ranks)
    ]
    for step, expected in enumerate(whole):
        count = 8 // ranks // micro_batch
        parts = [part for rank in per_rank for part in rank[step * count : (step + 1) * count]]
        assert [caption for part in parts for caption in part["caption"]] == expected["caption"]
        assert torch.equal(torch.cat([part["sample_index"] for part in parts]), expected["sample_index"])


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_at_a_draw_continues_the_same_batches(tmp_path: Path, workers: int) -> None:
    write_images(tmp_path)
    dataset = TrainingDataset(tmp_path)
    order = GlobalOrder(len(dataset), shuffle=True, seed=1)
    layout = BatchLayout(4, 2, 0, 1)
    whole = [batch["caption"] for batch in islice(batches(dataset, order, layout), 10)]
    resumed = [
        batch["caption"] for batch in islice(batches(dataset, order, layout, 12, num_workers=workers), 4)
    ]
    assert resumed == whole[6:10]


def test_every_epoch_is_another_permutation() -> None:
    order = GlobalOrder(50, shuffle=True, seed=0)
    epochs = [[order[draw] for draw in range(50 * epoch, 50 * epoch + 50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [order[draw] for draw in range(50)] == epochs[0]


def test_a_corrupt_member_is_skipped_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = [{"png": png(index), "txt": b"x"} for index in range(3)]
    content[1]["png"] = b"not a picture"
    write_shard(tmp_path / "part-000.tar", content)
    dataset = ShardDataset(tmp_path, ["png", "txt"])
    with caplog.at_level(logging.WARNING):
        replacement = dataset[1]
    assert np.array_equal(replacement["png"], dataset[2]["png"])
    assert dataset.skipped == 1
    assert "000001" in caplog.text and "part-000.tar" in caplog.text


def test_a_picture_of_another_size_is_skipped_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large = io.BytesIO()
    Image.fromarray(np.zeros((5, 4, 3), dtype=np.uint8)).save(large, format="png")
    pictures = [png(0), large.getvalue(), png(2)]
    write_shard(tmp_path / "part-000.tar", [{"png": picture, "txt": b"x"} for picture in pictures])
    dataset = TrainingDataset(tmp_path)
    with caplog.at_level(logging.WARNING):
        batch = next(batches(dataset, GlobalOrder(3, shuffle=False, seed=0), BatchLayout(3, 3, 0, 1)))
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 2, 2]
    assert dataset.samples.skipped == 1
    assert "000001" in caplog.text and "(3, 5, 4)" in caplog.text


def test_a_cut_off_shard_gives_the_samples_before_the_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, shards=2)
    shard = tmp_path / "part-001.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with caplog.at_level(logging.WARNING):
        dataset = ShardDataset(tmp_path, ["png", "txt"])
    assert 6 < len(dataset) < 12
    assert "part-001.tar" in caplog.text
    assert dataset[len(dataset) - 1]["txt"].startswith("caption 1")


@pytest.mark.parametrize("damage", ["header", "cut before a header", "cut inside a header"])
def test_damage_between_samples_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    write_images(tmp_path, shards=1)
    shard = tmp_path / "part-000.tar"
    with tarfile.open(shard) as tar:
        offset = tar.getmembers()[6].offset  # the first member of the fourth sample
    content = shard.read_bytes()
    damaged = {
        "header": content[:offset] + b"\xff" * 64 + content[offset + 64 :],
        "cut before a header": content[:offset],
        "cut inside a header": content[: offset + 100],
    }
    shard.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        assert len(ShardDataset(tmp_path, ["png", "txt"])) == 3
    assert "part-000.tar" in caplog.text and "first 3 samples" in caplog.text


def test_a_sound_shard_gives_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path)
    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as writer:
        writer.write({"__key__": "a", "png": png(1), "txt": "x"})
    with caplog.at_level(logging.WARNING):
        assert len(ShardDataset(tmp_path, ["png", "txt"])) == 13
    assert not caplog.records


def test_an_empty_first_shard_does_not_hide_precomputed_samples(tmp_path: Path) -> None:
    sample = {
        name: array(np.ones((1, 2))) for name in ("latents.npy", "text_hidden_states.npy", "text_pooled.npy")
    }
    write_shard(tmp_path / "b.tar", [sample, sample])
    (tmp_path / "a.tar").write_bytes(b"")
    dataset = TrainingDataset(tmp_path)
    assert dataset.precomputed and len(dataset) == 2


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f8", "|u1"])
def test_arrays_equal_those_numpy_reads(tmp_path: Path, dtype: str, order: str) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(24).reshape(2, 3, 4).astype(dtype, order=order))
    write_shard(tmp_path / "a.tar", [{"npy": buffer.getvalue()}])
    buffer.seek(0)
    read = ShardDataset(tmp_path)[0]["npy"]
    assert read.dtype == np.dtype(dtype) and np.array_equal(read, np.load(buffer))


SOUND_ARRAY = array(np.ones((2, 3)))


@pytest.mark.parametrize(
    ("extension", "content"),
    [
        ("png", b""),
        ("png", png(1)[:-30]),
        ("txt", b"\xff"),
        ("json", b"{"),
        ("npy", b""),
        ("npy", SOUND_ARRAY[:-1]),
        ("npy", SOUND_ARRAY + b"x"),
        ("npy", SOUND_ARRAY.replace(b"(2, 3)", b"(2, 3(")),
        ("npy", SOUND_ARRAY.replace(b"(2, 3)", b"(-2,3)")),
        ("npy", b"PK\x03\x04" + SOUND_ARRAY[4:]),
    ],
)
def test_every_kind_of_damaged_member_is_replaced(tmp_path: Path, extension: str, content: bytes) -> None:
    sound = {"png": png(1), "json": b"{}", "txt": b"sound", "npy": SOUND_ARRAY}
    write_shard(tmp_path / "a.tar", [{**sound, extension: content}, sound])
    dataset = ShardDataset(tmp_path)
    assert dataset[0]["__key__"] == "000001"
    assert dataset.skipped == 1


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "exploded",))

    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    write_shard(
        tmp_path / "a.tar",
        [
            {"pyd": pickle.dumps(Bomb()), "npy": buffer.getvalue(), "txt": b"x"},
            {"npy": array(np.ones(2)), "txt": b"y"},
        ],
    )
    sample = ShardDataset(tmp_path)[0]
    assert sample["txt"] == "y" and "pyd" not in sample
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "make", [lambda folder: None, lambda folder: folder.mkdir()], ids=["missing", "empty"]
)
def test_missing_or_empty_folders_are_the_users_mistake(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "data")
    with pytest.raises(UserError, match="data"):
        ShardDataset(tmp_path / "data")
