"""Shards and their order: the same samples as webdataset reads, any layout, any starting point, damage survived."""

import errno
import io
import logging
import logging.handlers
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rmoe_megatron.data import loader
from rmoe_megatron.data.loader import BatchLayout, batches
from rmoe_megatron.data.order import GlobalOrder
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.data.training_dataset import SampleFormat, TrainingDataset
from rmoe_megatron.errors import UserError
from tests.support.runs import array, write_shard


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(buffer, format="png")
    return buffer.getvalue()


def unconverted(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def picture(file_format: str, mode: str, size: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (size, size)).save(buffer, format=file_format)
    return buffer.getvalue()


SOUND_ARRAY = array(np.ones((2, 3)))


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
    dataset = TrainingDataset(tmp_path, SampleFormat())
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
        # The first micro-batches of all ranks, then the second ones.
        parts = [rank[step * count + place] for place in range(count) for rank in per_rank]
        assert [caption for part in parts for caption in part["caption"]] == expected["caption"]
        assert torch.equal(torch.cat([part["draw_index"] for part in parts]), expected["draw_index"])


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_at_a_draw_continues_the_same_batches(tmp_path: Path, workers: int) -> None:
    write_images(tmp_path)
    dataset = TrainingDataset(tmp_path, SampleFormat())
    order = GlobalOrder(len(dataset), shuffle=True, seed=1)
    layout = BatchLayout(4, 2, 0, 1)
    whole = [batch["caption"] for batch in islice(batches(dataset, order, layout), 10)]
    resumed = [
        batch["caption"] for batch in islice(batches(dataset, order, layout, 12, num_workers=workers), 4)
    ]
    assert resumed == whole[6:10]


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
    assert "000001" in caplog.text
    assert "part-000.tar" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_used_is_replaced_and_named_with_its_draw(tmp_path: Path, workers: int) -> None:
    large = io.BytesIO()
    Image.fromarray(np.zeros((5, 4, 3), dtype=np.uint8)).save(large, format="png")
    pictures = [png(0), large.getvalue(), png(2)]
    write_shard(tmp_path / "part-000.tar", [{"png": picture, "txt": b"x"} for picture in pictures])
    dataset = TrainingDataset(tmp_path, SampleFormat())
    order, layout = GlobalOrder(3, shuffle=False, seed=0), BatchLayout(3, 3, 0, 1)
    batch = next(batches(dataset, order, layout, num_workers=workers))
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 2, 2]
    (bad,) = batch["bad_samples"]
    assert (bad.shard, bad.key, bad.draw) == (str(tmp_path / "part-000.tar"), "000001", 1)
    assert "(3, 5, 4)" in bad.reason


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
        samples = ShardDataset(tmp_path, ["png", "txt"])
    # The fourth sample has lost its picture; those after it are found again.
    expected = ["000000", "000001", "000002", *(["000004", "000005"] if damage == "header" else [])]
    assert [samples[index]["__key__"] for index in range(len(samples))] == expected
    assert f"{shard} is damaged" in caplog.text
    assert str(offset) in caplog.text


def test_a_hole_of_zeros_is_no_end_of_the_archive(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, shards=1, samples=40)
    shard = tmp_path / "part-000.tar"
    with tarfile.open(shard) as tar:
        start, end = (tar.getmembers()[2 * sample].offset for sample in (4, 6))
    content = shard.read_bytes()
    shard.write_bytes(content[:start] + bytes(end - start) + content[end:])
    with caplog.at_level(logging.WARNING):
        samples = ShardDataset(tmp_path, ["png", "txt"])
    assert [samples.name(index) for index in range(len(samples))] == [
        f"{sample:06d}" for sample in range(40) if sample not in (4, 5)
    ]
    assert f"{shard} is damaged (no members in bytes {start} to {end}); the 38 samples found" in caplog.text


@pytest.mark.parametrize("zeros", [1024, 1000, 10240, 1 << 21])
def test_any_number_of_zeros_ends_an_archive(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, zeros: int
) -> None:
    write_images(tmp_path, shards=1)
    shard = tmp_path / "part-000.tar"
    with tarfile.open(shard) as tar:
        tar.getmembers()
        end = tar.offset
    assert not any(shard.read_bytes()[end:])
    shard.write_bytes(shard.read_bytes()[:end] + bytes(zeros))
    with caplog.at_level(logging.WARNING):
        assert len(ShardDataset(tmp_path, ["png", "txt"])) == 6
    assert not caplog.records


def dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, dangling_link])
def test_what_cannot_be_a_shard_is_named(tmp_path: Path, make: Callable[[Path], None]) -> None:
    write_images(tmp_path, shards=1)
    make(tmp_path / "part-001.tar")
    with pytest.raises(UserError, match=r"part-001\.tar cannot be read"):
        ShardDataset(tmp_path)


def test_a_shard_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, shards=1)

    opened = Path.open

    def refuse(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.suffix == ".tar":
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"part-000\.tar cannot be read \(Permission denied\)"):
        ShardDataset(tmp_path)


def test_samples_that_lack_a_member_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shard(tmp_path / "a.tar", [{"png": png(1), "txt": b"x"}, {"png": png(1)}, {"txt": b"x"}])
    with caplog.at_level(logging.WARNING):
        assert len(ShardDataset(tmp_path, ["png", "txt"])) == 1
    assert f"2 of the 3 samples in {tmp_path} have no members png, txt" in caplog.text


@pytest.fixture(scope="module")
def sound_shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shard = tmp_path_factory.mktemp("mutated") / "a.tar"
    sample = {"png": png(1), "json": b'{"a": [1]}', "txt": b"caption", "cls": b"3", "npy": SOUND_ARRAY}
    write_shard(shard, [sample] * 4)
    return shard


MUTATIONS = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "zero"]), st.floats(0, 1), st.integers(1, 2000)),
    min_size=1,
    max_size=4,
)


def mutate(content: bytes, mutations: list[tuple[str, float, int]]) -> bytes:
    for kind, where, amount in mutations:
        start = int(where * (len(content) - 1))
        inserted = {
            "flip": bytes([content[start] ^ (amount % 255 + 1)]) if content else b"",
            "cut": b"",
            "insert": bytes(byte * 7 % 256 for byte in range(amount)),
            "zero": bytes(amount),
        }[kind]
        removed = {"flip": 1, "cut": amount, "insert": 0, "zero": amount}[kind]
        content = content[:start] + inserted + content[start + removed :]
    return content


def is_sound(content: bytes, original: Path) -> bool:
    """Whether an archive has headers of the original and nothing else, but for the zeros at its end."""
    with tarfile.open(original) as tar:
        sizes = {original.read_bytes()[member.offset :][:512]: -(-member.size // 512) * 512 for member in tar}
    while content[:512] in sizes:
        content = content[512 + sizes[content[:512]] :]
    return len(content) >= 512 and not any(content)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(mutations=MUTATIONS)
def test_damage_is_told_or_harmless(sound_shard: Path, mutations: list[tuple[str, float, int]]) -> None:
    """Whatever happens to the bytes: samples that were there, and a warning or UserError if a header is damaged."""
    damaged = sound_shard.parent / "damaged" / "a.tar"
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_bytes(mutate(sound_shard.read_bytes(), mutations))
    told = logging.handlers.BufferingHandler(capacity=1 << 30)
    logger = logging.getLogger("rmoe_megatron.data")
    logger.addHandler(told)
    try:
        dataset = ShardDataset(damaged.parent, ["png", "json", "txt", "cls", "npy"])
        samples = [dataset[index] for index in range(len(dataset))]
    except UserError:
        return
    finally:
        logger.removeHandler(told)
    assert len(samples) == len(dataset) <= 4
    assert {sample["__key__"] for sample in samples} <= {f"{number:06d}" for number in range(4)}
    assert told.buffer or is_sound(damaged.read_bytes(), sound_shard)


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
    dataset = TrainingDataset(tmp_path, SampleFormat())
    assert dataset.precomputed
    assert len(dataset) == 2


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f8", "|u1"])
def test_arrays_equal_those_numpy_reads(tmp_path: Path, dtype: str, order: str) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(24).reshape(2, 3, 4).astype(dtype, order=order))
    write_shard(tmp_path / "a.tar", [{"npy": buffer.getvalue()}])
    buffer.seek(0)
    read = ShardDataset(tmp_path)[0]["npy"]
    assert read.dtype == np.dtype(dtype)
    assert np.array_equal(read, np.load(buffer))


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
        ("npy", SOUND_ARRAY.replace(b"(2, 3), }  ", b"(-2, -3), }")),
        ("npy", SOUND_ARRAY.replace(b"(2, 3), }" + b" " * 16, b"(1000000000000000000,), }")),
        *(
            ("npy", unconverted(np.zeros(2, dtype)))
            for dtype in ("c8", "M8[s]", "m8[s]", "S3", "U3", "V3", [("a", "f4")])
        ),
        ("cls", b"three"),
        ("cls", b"1" * 10_000),
        ("json", b"[" * 100_000),
        ("png", picture("tiff", "RGB")),
        ("png", picture("png", "1", 9460)),  # 89 million pixels
        ("png", picture("png", "1", 13400)),
        ("npy", b"PK\x03\x04" + SOUND_ARRAY[4:]),
    ],
)
def test_every_kind_of_damaged_member_is_replaced(tmp_path: Path, extension: str, content: bytes) -> None:
    sound = {"png": png(1), "json": b"{}", "txt": b"sound", "npy": SOUND_ARRAY, "cls": b"1"}
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
    assert sample["txt"] == "y"
    assert "pyd" not in sample
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_pictures_of_eight_bits_or_less_become_rgb(tmp_path: Path, mode: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), "white").convert(mode).save(buffer, format="png")
    write_shard(tmp_path / "a.tar", [{"png": buffer.getvalue()}])
    read = ShardDataset(tmp_path)[0]["png"]
    assert read.dtype == np.uint8
    assert np.array_equal(read, np.full((3, 2, 3), 255))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_mistake_is_one_sentence_from_any_process(tmp_path: Path, workers: int) -> None:
    write_shard(tmp_path / "a.tar", [{"png": png(1), "cls": b"7"}] * 4)
    dataset = TrainingDataset(tmp_path, SampleFormat(num_classes=5))
    loaded = batches(dataset, GlobalOrder(4, False, 0), BatchLayout(2, 2, 0, 1), num_workers=workers)
    with pytest.raises(UserError) as mistake:
        next(loaded)
    assert str(mistake.value).startswith("Sample 000000 of ")
    assert "\n" not in str(mistake.value)


@pytest.mark.parametrize(
    "make", [lambda folder: None, lambda folder: folder.mkdir()], ids=["missing", "empty"]
)
def test_missing_or_empty_folders_are_the_users_mistake(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path / "data")
    with pytest.raises(UserError, match="data"):
        ShardDataset(tmp_path / "data")


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError(104, "reset"), EOFError(), RuntimeError("Pin memory thread exited unexpectedly")],
)
def test_the_end_of_a_connection_to_a_worker_is_the_worker_s(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded() -> Iterator[int]:
        yield 1
        raise error

    monkeypatch.setattr("signal.signal", lambda *_: None)
    batches_until = loader._until_a_worker_ends(loaded())
    assert next(batches_until) == 1
    with pytest.raises(RuntimeError, match="DataLoader worker ended"):
        next(batches_until)


def test_another_error_of_loading_stays_itself() -> None:
    def loaded() -> Iterator[int]:
        yield from ()
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="^shapes differ$"):
        next(loader._until_a_worker_ends(loaded()))
