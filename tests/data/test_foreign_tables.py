"""Tables as other programs write them: each is read as it was meant, or refused in a sentence that says what to do."""

import base64
import gzip
import io
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import feather, parquet

from rmoe_megatron.data.packing.pack import pack
from rmoe_megatron.data.packing.rows import Packed
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.errors import UserError
from tests.support.runs import write_shard

PLAIN = "image,caption\n0.png,a cat\n1.png,Bär\n"
READ: list[dict[str, Any]] = [{"txt": "a cat"}, {"txt": "Bär"}]
PATHS, CAPTIONS = ["0.png", "1.png"], ["a cat", "a dog"]


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, format="png")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.png").write_bytes(png(number))
    return folder


def packed(source: Path) -> tuple[list[dict[str, Any]], Packed]:
    """Pack a source; returns text and JSON of the samples."""
    found = pack(source, source.parent / "packed")
    samples = ShardDataset(source.parent / "packed")
    whole = (samples[index] for index in range(len(samples)))
    return [{name: sample[name] for name in ("txt", "json") if name in sample} for sample in whole], found


TEXTS: dict[str, tuple[str, bytes, list[dict[str, Any]]]] = {
    "UTF-16, Excel's Unicode text": ("a.tsv", PLAIN.replace(",", "\t").encode("utf-16"), READ),
    "UTF-16, big end first": ("a.csv", b"\xfe\xff" + PLAIN.encode("utf-16-be"), READ),
    "UTF-16, JSON lines": ("a.jsonl", '{"image": "1.png", "caption": "Bär"}\n'.encode("utf-16"), READ[1:]),
    "semicolons": ("a.csv", PLAIN.replace(",", ";").encode(), READ),
    "a line that names the separator": ("a.csv", f"sep=;\r\n{PLAIN.replace(',', ';')}".encode(), READ),
    "a separator that needs no line": ("a.csv", f"sep=,\n{PLAIN}".encode(), READ),
    "tabs": ("a.csv", PLAIN.replace(",", "\t").encode(), READ),
    "decimal commas": (
        "a.csv", b"image;caption;score;size\n0.png;a cat;0,5;512\n1.png;b, c;-12,25;640\n",
        [{"txt": "a cat", "json": {"score": 0.5, "size": 512}}, {"txt": "b, c", "json": {"score": -12.25, "size": 640}}],
    ),
    "an extension in capitals": ("A.CSV", PLAIN.encode(), READ),
    "lines that end as on a Mac of before 2001": ("a.csv", PLAIN.replace("\n", "\r").encode(), READ),
    "spaces around names and fields": ("a.csv", PLAIN.replace(",", " , ").encode(), READ),
    "paths of Windows": ("a.csv", b"image,caption\n.\\1.png,B\xc3\xa4r\n", READ[1:]),
    "numbers of rows, as pandas writes them": (
        "a.csv", b",image,caption\n7,0.png,a cat\n", [{"txt": "a cat", "json": {"column 1": 7}}],
    ),
    "commas behind the last column": ("a.csv", b"image,caption,,\n0.png,a cat,,\n", READ[:1]),
    "ndjson": ("a.ndjson", b'{"image": "0.png", "caption": "a cat"}\n', READ[:1]),
    "a picture as a data URL": (
        "a.jsonl", json.dumps({"image": "data:image/png;base64," + base64.b64encode(png(1)).decode(), "text": "a cat"}).encode(),
        READ[:1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_a_table_of_text_is_read_as_it_was_meant(name: str, folder: Path) -> None:
    file, content, expected = TEXTS[name]
    (folder / file).write_bytes(content)
    assert packed(folder / file)[0] == expected


REFUSED = {
    "cp1252": ("a.csv", PLAIN.encode("cp1252"), "a.csv cannot be read: it is no UTF-8 text .byte 33 is none.; save it as UTF-8"),
    "gzip": ("a.csv.gz", gzip.compress(PLAIN.encode()), "a.csv.gz is compressed; unpack it first"),
    "gzip in disguise": ("a.csv", gzip.compress(PLAIN.encode()), "a.csv cannot be read: it is compressed with gzip"),
    "a workbook": ("a.xlsx", b"PK\3\4", "a.xlsx is a workbook; save the sheet as CSV UTF-8"),
    "a workbook in disguise": ("a.csv", b"PK\3\4", "it is a ZIP archive, as Excel's workbooks are"),
    "a column twice": ("a.csv", b"image,caption,caption\n0.png,a,b\n", "has the column caption twice"),
    "one JSON value": ("a.json", b"[]", "a.json is one JSON value; a table has an object a line"),
    "another machine": ("a.csv", b"image,caption\ns3://b/0.png,a\n", "it lies at s3://b/0.png; copy it to this machine"),
    "a long text": ("a.csv", b"image,caption\n" + b"x" * 9000 + b",a\n", "named by a text of 9000 characters, which is no path"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_table_is_refused_with_what_to_do(name: str, folder: Path) -> None:
    file, content, words = REFUSED[name]
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=words) as refusal:
        pack(folder / file, folder.parent / "packed")
    assert len(str(refusal.value)) < 600


def test_one_value_that_is_no_number_costs_itself_alone(folder: Path) -> None:
    (folder / "a.jsonl").write_text(
        '{"image": "0.png", "caption": "a cat", "score": NaN, "width": 3}\n'
        '{"image": "1.png", "caption": "Bär", "score": 1.5, "width": 4}\n'
    )
    samples, found = packed(folder / "a.jsonl")
    assert [sample["json"] for sample in samples] == [{"width": 3}, {"score": 1.5, "width": 4}]
    assert found.dropped_columns == {"score": "float"}


COLUMNS: dict[str, tuple[Any, list[Any], str | None]] = {
    "dictionary": (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"], None),
    "large text": (pa.array(["x", "y"], pa.large_string()), ["x", "y"], None),
    "views of text": (pa.array(["x", "y"], pa.string_view()), ["x", "y"], None),
    "decimals": (pa.array([Decimal("1.50"), Decimal("7.00")]), [1.5, 7], None),
    "half": (pa.array(np.array([1.5, 2], np.float16)), [1.5, 2.0], None),
    "objects": (pa.array([{"a": {"b": [1, 2]}}, {"a": {"b": []}}]), [{"a": {"b": [1, 2]}}, {"a": {"b": []}}], None),
    "nanoseconds": (pa.array([1, 1234567891], pa.timestamp("ns")), [None, None], "timestamp[ns]"),
    "a zone that is none": (pa.array([1, 2], pa.timestamp("ms", tz="No/Where")), [None, None], "timestamp[ms, tz=No/Where]"),
    "far dates": (pa.array([2**30, 2**30], pa.date32()), [None, None], "date32[day]"),
    "short times": (pa.array([1, 2], pa.duration("ns")), [None, None], "duration[ns]"),
    "bytes": (pa.array([b"1", b"2"]), [None, None], "bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("kind", ["parquet", "feather"])
def test_a_column_of_any_type_is_kept_or_costs_itself(kind: str, name: str, folder: Path) -> None:
    column, expected, dropped = COLUMNS[name]
    if kind == "parquet" and name == "half":
        column = column.cast(pa.float32())
    table = pa.table({"image": PATHS, "caption": CAPTIONS, "extra": column, "width": [3, 4]})
    write = parquet.write_table if kind == "parquet" else feather.write_feather
    write(table, str(folder / f"a.{kind}"))
    samples, found = packed(folder / f"a.{kind}")
    assert [sample["txt"] for sample in samples] == CAPTIONS
    assert [sample["json"].get("extra") for sample in samples] == expected
    assert [sample["json"]["width"] for sample in samples] == [3, 4]
    assert found.dropped_columns == ({"extra": dropped} if dropped is not None else {})


def test_every_sample_has_the_list_of_its_captions(folder: Path) -> None:
    """So that ``data.captions=[json:caption]`` finds one in each."""
    table = pa.table({"image": PATHS, "caption": [["a cat", "an animal"], ["a dog"]]})
    parquet.write_table(table, folder / "a.parquet")
    samples, found = packed(folder / "a.parquet")
    assert [sample["json"] for sample in samples] == [
        {"caption": ["a cat", "an animal"]},
        {"caption": ["a dog"]},
    ]
    assert found.with_several_captions == {"caption": 1}


def test_a_caption_that_is_no_text_costs_its_row(folder: Path) -> None:
    raw = pa.array([b"a\xff", b"a dog"], pa.binary())
    captions = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    parquet.write_table(pa.table({"image": PATHS, "caption": captions}), folder / "a.parquet")
    samples, found = packed(folder / "a.parquet")
    assert samples == [{"txt": "a dog"}]
    assert found.left_out[0][0] == "row 0 of a.parquet"


def test_a_damaged_part_of_a_table_is_named(folder: Path) -> None:
    path = folder / "a.parquet"
    captions = [f"caption {number * 7919}" for number in range(1000)]
    parquet.write_table(
        pa.table({"image": ["0.png"] * 1000, "caption": captions}), path, use_dictionary=False
    )
    content = bytearray(path.read_bytes())
    content[100:200] = b"\xfe" * 100
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="a.parquet cannot be read"):
        pack(path, folder.parent / "packed")
    assert not (folder.parent / "packed").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("0.tar.gz", "0.tar.gz is compressed; unpack it first"), ("a.zip", "a.zip is compressed"),
        ("a.csv", "to take those that .*a.csv names, give this path"), ("a.json", "a.json is one JSON value"),
    ],
)  # fmt: skip
def test_a_folder_without_pictures_says_what_to_do(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / name).write_bytes(b"x")
    with pytest.raises(UserError, match=words):
        pack(tmp_path / "source", tmp_path / "packed")


@pytest.mark.parametrize(
    ("begins", "words"),
    [
        (gzip.compress(b"x" * 600), "it is compressed with gzip; unpack it first .`gunzip`."),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "it is compressed with zstd; unpack it first .`unzstd`."),
        (b"PK\3\4" + bytes(600), "it is a ZIP archive; unpack it first .`unzip`."),
    ],
    ids=["gzip", "zstd", "zip"],  # gzip's bytes hold the time
)
def test_a_compressed_shard_is_named_as_one(begins: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "0.tar").write_bytes(begins)
    with pytest.raises(UserError, match=f"hold no samples; 0.tar is damaged: {words}"):
        pack(tmp_path / "source", tmp_path / "packed")


def test_a_class_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [{"png": png(1), "cls": b"\xef\xbb\xbf3\r\n"}])
    assert ShardDataset(tmp_path)[0]["cls"] == 3


def test_sidecars_as_windows_writes_them(folder: Path) -> None:
    (folder / "0.png").rename(folder / "0.PNG")
    (folder / "0.TXT").write_text("a cat")
    (folder / "1.txt").write_bytes("Bär".encode("utf-16"))
    for name in ("2", "3"):
        (folder / f"{name}.png").write_bytes(png(2))
    (folder / "2.txt").write_bytes("Bär".encode("cp1252"))
    (folder / "3.json").write_text("[1, 2]")
    (folder / "._1.png").write_bytes(b"\0\5\x16\7")
    samples, found = packed(folder)
    assert samples == READ
    assert found.left_out == [
        ("2.png", "of 2.txt: it is no UTF-8 text (byte 1 is none)"), ("3.png", "3.json holds no object, whose values have names"),
    ]  # fmt: skip
    assert found.beside == ["._1.png"]
