"""Own pictures become shards: folders with sidecars, tables of every kind, and what is left out is named."""

import csv
import datetime
import io
import json
import math
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from rmoe_megatron.config.buckets import Bucket
from rmoe_megatron.config.captions import parse_captions
from rmoe_megatron.data.packing.pack import LEFT_OUT, pack
from rmoe_megatron.data.packing.rows import Columns
from rmoe_megatron.data.shards.bucketing import Bucketing
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.data.training_dataset import SampleFormat, TrainingDataset
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
    with pytest.raises(UserError, match=r"None of the 1 pictures .* \(a\.jpg: it is no picture"):
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


def packed_captions(out: Path) -> list[str]:
    samples = ShardDataset(out)
    return [samples[index]["txt"] for index in range(len(samples))]


def pictures_beside(folder: Path, number: int) -> None:
    for each in range(number):
        write(folder / f"{each}.jpg", picture(10 * each))


@pytest.mark.parametrize("mark", [",", "\t"], ids=["csv", "tsv"])
def test_numbers_of_text_tables_are_numbers(tmp_path: Path, mark: str) -> None:
    """As in JSON lines: so a filter compares them. What is no number as JSON writes it stays text, with its whole column."""
    pictures_beside(tmp_path, 3)
    lines = [
        ("image", "caption", "score", "count", "id", "mixed", "empty"),
        ("0.jpg", "1", "6.5", "3", "007", "1", ""),
        ("1.jpg", "2.50", "-1e-3", "0", "12", "x", ""),
        ("2.jpg", "c", "", "12", "1", "2", ""),
    ]
    table = tmp_path / ("t.csv" if mark == "," else "t.tsv")
    write(table, "\r\n".join(mark.join(line) for line in lines) + "\r\n")
    pack(table, tmp_path / "out")
    samples = ShardDataset(tmp_path / "out")
    assert [samples[index]["json"] for index in range(3)] == [
        {"score": 6.5, "count": 3, "id": "007", "mixed": "1", "empty": ""},
        {"score": -0.001, "count": 0, "id": "12", "mixed": "x", "empty": ""},
        {"count": 12, "id": "1", "mixed": "2", "empty": ""},
    ]
    assert packed_captions(tmp_path / "out") == ["1", "2.50", "c"]


def test_a_tsv_has_no_quoting_unless_it_is_written_with_it(tmp_path: Path) -> None:
    pictures_beside(tmp_path, 4)
    plain = 'image\tcaption\n0.jpg\t"a cat\n1.jpg\ta 5" screw\n2.jpg\t"STOP"\n3.jpg\ta "b" c"\n'
    write(tmp_path / "plain.tsv", plain)
    pack(tmp_path / "plain.tsv", tmp_path / "plain")
    assert packed_captions(tmp_path / "plain") == ['"a cat', 'a 5" screw', '"STOP"', 'a "b" c"']
    texts = ['a 5" screw', "two\ttabs", "two\nlines", "plain"]
    for name, quoting in (("minimal", csv.QUOTE_MINIMAL), ("all", csv.QUOTE_ALL)):
        with (tmp_path / f"{name}.tsv").open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t", quoting=quoting)
            writer.writerows([("image", "caption"), *((f"{n}.jpg", text) for n, text in enumerate(texts))])
        pack(tmp_path / f"{name}.tsv", tmp_path / name)
        assert packed_captions(tmp_path / name) == texts
    with (tmp_path / "doubled.tsv").open("w", newline="") as file:  # no field of it has a tab or a line break
        csv.writer(file, delimiter="\t").writerows(
            [("image", "caption"), ("0.jpg", 'a 5" screw'), ("1.jpg", "b")]
        )
    pack(tmp_path / "doubled.tsv", tmp_path / "doubled")
    assert packed_captions(tmp_path / "doubled") == ['a 5" screw', "b"]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_row_of_another_length_is_left_out_by_name(tmp_path: Path, kind: str) -> None:
    pictures_beside(tmp_path, 3)
    mark = "," if kind == "csv" else "\t"
    rows = [("image", "caption"), ("0.jpg", "a"), ("1.jpg", "b", "c"), ("2.jpg",), ("2.jpg", "d")]
    write(tmp_path / f"t.{kind}", "\n".join(mark.join(row) for row in rows))
    packed = pack(tmp_path / f"t.{kind}", tmp_path / "out")
    assert packed_captions(tmp_path / "out") == ["a", "d"]
    assert packed.left_out == [
        (f"row 1 of t.{kind}", "it has 3 fields, and the header 2"), (f"row 2 of t.{kind}", "it has 1 fields, and the header 2"),
    ]  # fmt: skip


MARK = "\ufeff"


def test_a_byte_order_mark_is_none_of_the_text(tmp_path: Path) -> None:
    pictures_beside(tmp_path, 2)
    for name, content in {
        "t.csv": "image,caption\n0.jpg,a cat\n", "t.tsv": "image\tcaption\n0.jpg\ta cat\n",
        "t.jsonl": '{"image": "0.jpg", "caption": "a cat"}\n',
    }.items():  # fmt: skip
        write(tmp_path / name, MARK + content)
        pack(tmp_path / name, tmp_path / f"out-{name}")
        assert packed_captions(tmp_path / f"out-{name}") == ["a cat"]
    folder = tmp_path / "folder"
    pictures_beside(folder, 3)
    write(folder / "0.txt", MARK + "a cat")
    write(folder / "1.json", MARK + '{"caption": "a dog"}')
    write(folder / "2.caption", MARK + "a cow")
    pack(folder, tmp_path / "out")
    samples = ShardDataset(tmp_path / "out")
    assert [samples[0]["txt"], samples[1]["json"], samples[2]["caption"]] == [
        "a cat",
        {"caption": "a dog"},
        "a cow",
    ]


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0c", "\x1e"])
def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path, separator: str) -> None:
    pictures_beside(tmp_path, 1)
    text = f"a{separator}cat"
    for name, content in {
        "t.csv": f"image,caption\r\n0.jpg,{text}\r\n", "t.tsv": f"image\tcaption\n0.jpg\t{text}\n",
        "t.jsonl": json.dumps({"image": "0.jpg", "caption": text}, ensure_ascii=separator < " ") + "\n",
    }.items():  # fmt: skip
        write(tmp_path / name, content)
        pack(tmp_path / name, tmp_path / f"out-{name}")
        assert packed_captions(tmp_path / f"out-{name}") == [text], name


CAPTIONS = [None, "", "  ", [], [""], {"text": None}, {"other": "x"}, True, math.nan]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_rows_without_a_caption_are_left_out_and_named_whatever_else_they_have(
    tmp_path: Path, kind: str
) -> None:
    pictures_beside(tmp_path, 2)
    table = tmp_path / f"t.{kind}"
    values = [None, "", " "] if kind != "jsonl" else CAPTIONS
    rows = [{"image": "0.jpg", "caption": value, "score": 1.5} for value in ["a", *values, "b"]]
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    elif kind == "jsonl":
        write(table, "".join(f"{json.dumps(row)}\n" for row in rows if row["caption"] is not CAPTIONS[-1]))
    else:
        mark = "," if kind == "csv" else "\t"
        lines = [
            mark.join(("image", "caption", "score")),
            *(mark.join(("0.jpg", r["caption"] or "", "1.5")) for r in rows),
        ]
        write(table, "\n".join(lines))
    packed = pack(table, tmp_path / "out")
    assert packed_captions(tmp_path / "out") == ["a", "b"]
    left_out = len(values) - (kind == "jsonl")
    assert [name for name, _ in packed.left_out] == [
        f"row {number} of t.{kind}" for number in range(1, 1 + left_out)
    ]
    assert all("caption" in reason for _, reason in packed.left_out)


def test_captions_that_are_no_texts_are_read(tmp_path: Path) -> None:
    pictures_beside(tmp_path, 1)
    values = [5, 2.5, {"text": " a "}, {"raw": "b"}, [{"raw": "c"}, {"raw": "d"}], b"e".decode()]
    write(
        tmp_path / "t.jsonl",
        "".join(json.dumps({"image": "0.jpg", "caption": value}) + "\n" for value in values),
    )
    pack(tmp_path / "t.jsonl", tmp_path / "out")
    assert packed_captions(tmp_path / "out") == ["5", "2.5", "a", "b", "c", "e"]
    parquet.write_table(pyarrow.table({"image": ["0.jpg"], "caption": [b"bytes"]}), tmp_path / "t.parquet")
    pack(tmp_path / "t.parquet", tmp_path / "bytes")
    assert packed_captions(tmp_path / "bytes") == ["bytes"]


def test_a_list_of_captions_is_kept_whole_and_one_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures_beside(tmp_path, 2)
    rows = [
        {"image": f"{n}.jpg", "caption": [f"{n} {k}" for k in range(5)], "sentids": [1, 2]} for n in range(2)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    packed = pack(tmp_path / "t.parquet", tmp_path / "out")
    assert (packed.samples, packed.with_several_captions) == (2, {"caption": 2})
    assert packed_captions(tmp_path / "out") == ["0 0", "1 0"]
    assert ShardDataset(tmp_path / "out")[1]["json"] == {
        "caption": [f"1 {k}" for k in range(5)],
        "sentids": [1, 2],
    }
    dataset = TrainingDataset(
        tmp_path / "out", SampleFormat(captions=parse_captions(["json:caption"]), seed=1)
    )
    drawn = Counter(dataset.draw(0, draw)["caption"] for draw in range(1000))
    assert drawn.keys() == {f"0 {k}" for k in range(5)}
    assert min(drawn.values()) > 150  # of 200


def test_a_column_that_json_does_not_hold_costs_itself_alone(tmp_path: Path) -> None:
    pictures_beside(tmp_path, 3)
    when = datetime.datetime(2024, 1, 1)
    rows = [
        {"image": f"{n}.jpg", "caption": "a", "score": 1.5, "date": when if n else None} for n in range(3)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    packed = pack(tmp_path / "t.parquet", tmp_path / "out")
    samples = ShardDataset(tmp_path / "out")
    assert [samples[index]["json"] for index in range(3)] == [{"score": 1.5}] * 3
    assert packed.dropped_columns == {"date": "datetime"}


def test_what_lies_beside_the_pictures_is_named(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "mine")
    write(source / "metadata.csv", "file_name,text\n")
    write(source / "inner" / "notes.md", "x")
    packed = pack(source, tmp_path / "out")
    assert packed.beside == ["inner/notes.md", "metadata.csv"]
    code, errors = rmoe("data", "pack", str(source), str(tmp_path / "again"))
    assert (code, errors) == (0, "") or "Traceback" not in errors


def test_pictures_of_other_formats_are_left_out_by_name_and_jpegs_of_any_name_taken(tmp_path: Path) -> None:
    for name, file_format in (
        ("a.jpg", "jpeg"),
        ("b.jfif", "jpeg"),
        ("c.tif", "tiff"),
        ("d.gif", "gif"),
        ("e.jpg", "bmp"),
    ):
        write(tmp_path / "mine" / name, picture(10, file_format))
        write(tmp_path / "mine" / f"{name[0]}.txt", name)
    packed = pack(tmp_path / "mine", tmp_path / "out")
    assert not packed.beside
    assert [(name, reason.partition(";")[0]) for name, reason in packed.left_out] == [
        ("c.tif", "it is a TIFF picture"), ("d.gif", "it is a GIF picture"), ("e.jpg", "it is a BMP picture"),
    ]  # fmt: skip
    samples = ShardDataset(tmp_path / "out")
    assert [samples[index]["txt"] for index in range(len(samples))] == ["a.jpg", "b.jfif"]
