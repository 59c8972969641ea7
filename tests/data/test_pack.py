"""Own pictures become shards: folders with sidecars, tables of every kind, and what is left out is named."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.data.bucketing import Bucketing
from rmoe_megatron.data.pack import LEFT_OUT, Columns, pack
from rmoe_megatron.data.samples import SampleFormat, TrainingDataset
from rmoe_megatron.data.shards import ShardDataset
from rmoe_megatron.errors import UserError
from tests.support.commands import rmoe
from tests.support.configurations import MODEL
from tests.support.runs import make_run


def picture(value: int, file_format: str = "jpeg", size: tuple[int, int] = (20, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, format=file_format)
    return buffer.getvalue()


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def make_folder(folder: Path) -> Path:
    write(folder / "b.jpg", picture(10))
    write(folder / "b.txt", "ein Fuß\n")
    write(folder / "inner" / "a.PNG", picture(20, "png"))
    write(folder / "inner" / "a.json", '{"caption": "from JSON", "score": 0.5}')
    write(folder / "c.jpeg", picture(30, "webp"))  # called JPEG, and is WebP
    write(folder / "c.caption", "other")
    return folder


def test_a_folder_with_captions_beside_the_pictures(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "mine")
    write(source / "alone.jpg", picture(40))
    write(source / "broken.jpg", b"no picture")
    write(source / "notes.md", "no picture either")
    write(source / "latin.jpg", picture(50))
    write(source / "latin.txt", b"\xff")
    told: list[tuple[int, int]] = []
    packed = pack(source, tmp_path / "out", progress=lambda *done: told.append(done))
    assert (packed.samples, packed.shards) == (3, 1)
    assert told[-1] == (6, 6)
    assert {name for name, _ in packed.left_out} == {"alone.jpg", "broken.jpg", "latin.jpg"}
    assert dict(packed.left_out)["alone.jpg"] == "it has no caption"
    lines = [json.loads(line) for line in (tmp_path / "out" / LEFT_OUT).read_text().splitlines()]
    assert [(line["name"], line["reason"]) for line in lines] == packed.left_out
    with tarfile.open(tmp_path / "out" / "000000.tar") as tar:
        contents = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert contents["000000000.jpg"] == (source / "b.jpg").read_bytes()
    assert contents["000000001.webp"] == (source / "c.jpeg").read_bytes()
    assert contents["000000002.png"] == (source / "inner" / "a.PNG").read_bytes()
    samples = ShardDataset(tmp_path / "out")
    assert samples[0]["txt"] == "ein Fuß"
    assert samples[1]["caption"] == "other"
    assert samples[2]["json"] == {"caption": "from JSON", "score": 0.5}


@pytest.mark.parametrize(
    ("file_format", "extension"), [("jpeg", "jpg"), ("png", "png"), ("webp", "webp"), ("avif", "avif")]
)
def test_members_are_called_by_what_they_are(tmp_path: Path, file_format: str, extension: str) -> None:
    write(tmp_path / "mine" / "a.png", picture(60, file_format))
    write(tmp_path / "mine" / "a.txt", "a")
    pack(tmp_path / "mine", tmp_path / "out")
    assert ShardDataset(tmp_path / "out")[0][extension].shape == (3, 10, 20)


def rows(folder: Path) -> list[dict[str, object]]:
    for number in range(3):
        write(folder / "images" / f"{number}.jpg", picture(number))
    return [
        {"file": f"images/{number}.jpg", "text": f"number {number}", "score": number} for number in range(3)
    ]


def write_table(folder: Path, kind: str) -> Path:
    content, path = rows(folder), folder / f"table.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(content), path)
    elif kind == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in content))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file", "text", "score"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(content)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_names_pictures(tmp_path: Path, kind: str) -> None:
    table = write_table(tmp_path, kind)
    packed = pack(table, tmp_path / "out", Columns("file", "text"), samples_per_shard=2)
    assert (packed.samples, packed.shards, packed.left_out) == (3, 2, [])
    samples = ShardDataset(tmp_path / "out")
    assert [samples[index]["txt"] for index in range(3)] == ["number 0", "number 1", "number 2"]
    assert [int(samples[index]["json"]["score"]) for index in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="--image-column"):
        pack(table, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_folder_of_parquet_files_from_the_hub(tmp_path: Path) -> None:
    for part in range(2):
        content = [
            {"image": {"bytes": picture(10 * part + number), "path": None}, "caption": f"{part} {number}"}
            for number in range(2)
        ]
        content.append({"image": {"bytes": picture(0), "path": None}, "caption": None})
        (tmp_path / "data").mkdir(exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / "data" / f"train-{part}.parquet")
    packed = pack(tmp_path / "data", tmp_path / "out")
    assert packed.samples == 4
    assert packed.left_out == [(f"row 2 of train-{part}.parquet", "it has no caption") for part in range(2)]
    dataset = TrainingDataset(tmp_path / "out", SampleFormat(bucketing=Bucketing((Bucket(8, 8),))))
    assert [dataset.draw(index, 0)["caption"] for index in range(4)] == ["0 0", "0 1", "1 0", "1 1"]
    assert np.abs(dataset.draw(3, 0)["image"].numpy().astype(int) - 11).max() <= 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"\xff\xfe"),
        ("a.parquet", b"PAR1"),
        ("a.jsonl", b"[1]\n"),
        ("a.jsonl", b"{"),
        ("a.jsonl", b"[" * 100_000),
        ("a.txt", b"x"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    write(tmp_path / name, content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        pack(tmp_path / name, tmp_path / "out")


def test_nothing_to_pack_and_nothing_that_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures in"):
        pack(tmp_path / "empty", tmp_path / "out")
    write(tmp_path / "broken" / "a.jpg", b"x")
    with pytest.raises(UserError, match=r"None of the 1 pictures .* \(a\.jpg: cannot identify"):
        pack(tmp_path / "broken", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_from_a_folder_of_ones_own_in_two_commands(tmp_path: Path) -> None:
    for number in range(8):
        size = (MODEL.sample_size + 5 * number, MODEL.sample_size + 3 * (8 - number))
        write(tmp_path / "mine" / f"{number}.jpg", picture(20 * number, size=size))
        write(tmp_path / "mine" / f"{number}.txt", f"a grey picture, number {number}")
    code, errors = rmoe("data", "pack", f"{tmp_path}/mine", f"{tmp_path}/shards")
    assert code == 0, errors
    config = make_run(tmp_path)
    settings = [
        f"data.train={tmp_path}/shards",
        "data.validation=null",
        "training.steps=2",
        "optimizer.warmup_steps=1",
    ]
    code, errors = rmoe("train", str(config), *settings)
    assert code == 0, errors
    assert (tmp_path / "run" / "samples" / "step-00000002.png").is_file()
