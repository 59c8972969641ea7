"""Data sets as the Hugging Face libraries and img2dataset save them become shards; URLs are refused with what fetches them."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import ipc, parquet

from rmoe_megatron.data.packing.pack import pack
from rmoe_megatron.data.packing.rows import Columns
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.errors import UserError
from tests.data.test_pack import packed_captions, picture, write
from tests.data.test_strange_archives import HOW, arranged, photographs
from tests.support.commands import rmoe
from tests.support.runs import write_members, write_shard


def described(
    first: int, count: int = 2, caption: str = "text", image: str = "image"
) -> list[dict[str, Any]]:
    """Rows as the hub has them."""
    return [
        {
            image: {"bytes": picture(number), "path": f"{number}.jpg"},
            caption: f"number {number}",
            "score": number,
        }
        for number in range(first, first + count)
    ]


def write_arrow(path: Path, rows: list[dict[str, Any]], as_file: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    with (ipc.new_file if as_file else ipc.new_stream)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=1)


def write_saved(folder: Path, parts: list[list[dict[str, Any]]], **state: Any) -> Path:
    """What ``datasets.Dataset.save_to_disk`` writes (datasets 5.2): a stream of batches a file, and JSON beside them."""
    names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        write_arrow(folder / name, rows)
    files = [{"filename": name} for name in names]
    write(
        folder / "state.json",
        json.dumps({"_data_files": files, "_format_type": None, "_split": None} | state),
    )
    features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    write(folder / "dataset_info.json", json.dumps({"features": features}))
    return folder


def test_a_saved_dataset(tmp_path: Path) -> None:
    saved = write_saved(tmp_path / "saved", [described(0), described(2, 1)])
    packed = pack(saved, tmp_path / "out")
    assert (packed.samples, packed.left_out, packed.beside) == (3, [], [])
    assert packed.notes == ["the pictures are those of the column image, the captions those of text"]
    samples = ShardDataset(tmp_path / "out")
    assert [(samples[n]["txt"], samples[n]["json"]) for n in range(3)] == [
        (f"number {n}", {"score": n}) for n in range(3)
    ]
    assert [bytes(samples.contents(n)[1]["jpg"]) for n in range(3)] == [picture(n) for n in range(3)]


def test_a_saved_dictionary_of_splits(tmp_path: Path) -> None:
    for split, first in (("train", 0), ("my own", 5)):
        write_saved(tmp_path / "saved" / split, [described(first)])
    write(tmp_path / "saved" / "dataset_dict.json", json.dumps({"splits": ["train", "my own"]}))
    with pytest.raises(UserError, match="has the splits train, my own; choose one with --split"):
        pack(tmp_path / "saved", tmp_path / "out")
    with pytest.raises(UserError, match="has no split test; it has train, my own"):
        pack(tmp_path / "saved", tmp_path / "out", split="test")
    pack(tmp_path / "saved", tmp_path / "one", split="my own")
    pack(tmp_path / "saved", tmp_path / "all", split="all")
    assert packed_captions(tmp_path / "one") == ["number 5", "number 6"]
    assert packed_captions(tmp_path / "all") == ["number 0", "number 1", "number 5", "number 6"]
    write(tmp_path / "saved" / "dataset_dict.json", json.dumps({"splits": ["train"]}))
    pack(tmp_path / "saved", tmp_path / "single")
    assert packed_captions(tmp_path / "single") == ["number 0", "number 1"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, "flatten_indices"),
        ({"_data_files": [{"filename": "data-00000-of-00001.arrow"}, {"filename": "gone.arrow"}]}, "lacks its data file gone"),
        ({"_data_files": [{"filename": "../other/data-00000-of-00001.arrow"}]}, "lacks its data file"),
        ({"_data_files": []}, "names no data files"),
    ],
)  # fmt: skip
def test_a_saved_dataset_that_is_not_whole_is_refused(
    tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    write_saved(tmp_path / "other", [described(0)])
    saved = write_saved(tmp_path / "saved", [described(0)], **change)
    with pytest.raises(UserError, match=complaint):
        pack(saved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["arrow stream", "arrow file", "parquet"])
def test_splits_of_a_folder_of_tables_are_not_mixed(tmp_path: Path, kind: str) -> None:
    for split, first in (("train", 0), ("test", 5)):
        for part in range(2):
            rows = described(first + 2 * part, image="jpg", caption="caption")
            path = tmp_path / "data" / f"{split}-0000{part}-of-00002"
            if kind == "parquet":
                path.parent.mkdir(exist_ok=True)
                parquet.write_table(pyarrow.Table.from_pylist(rows), path.with_suffix(".parquet"))
            else:
                write_arrow(path.with_suffix(".arrow"), rows, as_file=kind == "arrow file")
    with pytest.raises(UserError, match="has the splits test, train; choose one"):
        pack(tmp_path / "data", tmp_path / "out")
    packed = pack(tmp_path / "data", tmp_path / "out", split="train")
    assert packed.beside == []
    assert packed_captions(tmp_path / "out") == [f"number {number}" for number in range(4)]
    pack(tmp_path / "data", tmp_path / "all", split="all")
    assert len(packed_captions(tmp_path / "all")) == 8


def test_splits_of_a_folder_of_pictures_are_not_mixed(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write(tmp_path / "mine" / split / "deep" / "a.jpg", picture(1))
        write(tmp_path / "mine" / split / "deep" / "a.txt", split)
    with pytest.raises(UserError, match="has the splits train, val"):
        pack(tmp_path / "mine", tmp_path / "out")
    pack(tmp_path / "mine", tmp_path / "out", split="val")
    assert packed_captions(tmp_path / "out") == ["val"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_an_imagefolder(tmp_path: Path, kind: str) -> None:
    rows = [
        {"file_name": f"deep/{number}.jpg", "text": f"number {number}", "score": number}
        for number in range(2)
    ]
    rows.append({"file_name": "gone.jpg", "text": "x", "score": 5})
    for number in range(4):
        write(tmp_path / "mine" / "deep" / f"{number}.jpg", picture(number))
    write(tmp_path / "mine" / "deep" / "2.txt", "of its own")
    write(tmp_path / "mine" / "deep" / "0.txt", "described twice")
    path = tmp_path / "mine" / f"metadata.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        write(path, "".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        write(
            path, "file_name,text,score\n" + "".join(",".join(map(str, row.values())) + "\n" for row in rows)
        )
    packed = pack(tmp_path / "mine", tmp_path / "out")
    assert packed_captions(tmp_path / "out") == ["number 0", "number 1", "of its own"]
    assert ShardDataset(tmp_path / "out")[1]["json"] == {"score": 1}
    assert [name for name, _ in packed.left_out] == [f"row 2 of metadata.{kind}", "deep/3.jpg"]
    assert packed.beside == ["deep/0.txt"]


def test_which_columns_are_meant(tmp_path: Path) -> None:
    table = tmp_path / "a.parquet"
    rows = [row | {"prompt": "p"} for row in described(0)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    with pytest.raises(
        UserError, match="has the columns image, text, score, prompt, but not image and caption"
    ):
        pack(table, tmp_path / "out")
    pack(table, tmp_path / "out", Columns(caption="prompt"))
    assert packed_captions(tmp_path / "out") == ["p", "p"]
    lines = [{"img": "0.jpg", "caption": "a"}, {"img": "0.jpg"}, {"caption": "b"}]
    write(tmp_path / "0.jpg", picture(1))
    write(tmp_path / "b.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    packed = pack(tmp_path / "b.jsonl", tmp_path / "lines")
    assert packed.left_out == [
        ("row 1 of b.jsonl", "it has no caption"),
        ("row 2 of b.jsonl", "it has no picture"),
    ]


STATISTICS = {
    "count": 3,
    "successes": 2,
    "failed_to_download": 1,
    "failed_to_resize": 0,
    "duration": 1.5,
    "status_dict": {},
}


def write_img2dataset(folder: Path, kind: str) -> None:
    """What img2dataset (1.47) leaves of three URLs of which two could be fetched, by --output_format."""
    rows = [
        {"url": f"https://example.org/{n}", "key": f"00000000{n}", "caption": f"number {n}", "status": "success", "error_message": None}
        for n in range(2)
    ]  # fmt: skip
    failed = {
        "url": "https://example.org/2",
        "key": "000000002",
        "caption": "x",
        "status": "failed_to_download",
        "error_message": "404",
    }
    contents: list[Any] = [picture(n) for n in range(2)]
    if kind == "webdataset":
        samples = [
            {"jpg": content, "txt": row["caption"].encode(), "json": json.dumps(row).encode()}
            for row, content in zip(rows, contents, strict=True)
        ]
        write_shard(folder / "00000.tar", samples)
    elif kind == "files":
        for row, content in zip(rows, contents, strict=True):
            for extension, value in (("jpg", content), ("txt", row["caption"]), ("json", json.dumps(row))):
                write(folder / "00000" / f"{row['key']}.{extension}", value)
    else:
        rows = [row | {"jpg": content} for row, content in zip(rows, contents, strict=True)]
        failed |= {"jpg": None}
    folder.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist([*rows, failed]), folder / "00000.parquet")
    write(folder / "00000_stats.json", json.dumps(STATISTICS))


@pytest.mark.parametrize("kind", ["webdataset", "files", "parquet"])
def test_what_img2dataset_writes(tmp_path: Path, kind: str) -> None:
    write_img2dataset(tmp_path / "fetched", kind)
    packed = pack(tmp_path / "fetched", tmp_path / "out")
    assert packed_captions(tmp_path / "out") == ["number 0", "number 1"]
    assert packed.beside == []
    assert any(
        "asked for 3 pictures and has fetched 2: 1 failed to download, 0 to resize" in note
        for note in packed.notes
    )
    expected = [("row 2 of 00000.parquet", "it could not be fetched: failed_to_download, 404")]
    assert packed.left_out == (expected if kind == "parquet" else [])
    assert ShardDataset(tmp_path / "out")[0]["json"]["url"] == "https://example.org/0"


@pytest.mark.parametrize("how", HOW[:2])
def test_shards_are_packed_anew(tmp_path: Path, how: str) -> None:
    members = arranged(photographs(5), how)
    write_members(
        tmp_path / "mine" / "0.tar", [*members, ("empty.png", picture(1, "png")), ("empty.txt", b" ")]
    )
    packed = pack(tmp_path / "mine", tmp_path / "out", samples_per_shard=3)
    assert (packed.samples, packed.shards) == (5, 2)
    assert packed.left_out == [("0.tar/empty", "its caption is empty")]
    samples = ShardDataset(tmp_path / "out")
    assert not len(samples.index.pieces)
    found = {
        samples[n]["txt"]: (int(samples[n]["png"][0, 0, 0]), samples[n]["json"]["number"]) for n in range(5)
    }
    assert found == {f"a {number}": (number, number) for number in range(5)}
    with pytest.raises(UserError, match="is a shard; name the folder"):
        pack(tmp_path / "mine" / "0.tar", tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "content", "command"),
    [
        ("list.txt", "https://a.org/1.jpg\nhttps://a.org/2.jpg\n", "--url_list {folder}/list.txt --input_format txt --output_format webdataset --output_folder list_pictures --resize_mode no"),
        ("t.csv", "url,text\nhttps://a.org/1.jpg,a\n", "--input_format csv --url_col url --caption_col text --output_format"),
        ("t.tsv", "URL\tTEXT\nhttps://a.org/1.jpg\ta\n", "--input_format tsv --url_col URL --caption_col TEXT --output_format"),
        ("t.jsonl", '{"image": "http://a.org/1.jpg", "caption": "a"}\n', "--input_format jsonl --url_col image --caption_col caption"),
    ],
)  # fmt: skip
def test_urls_are_refused_with_the_command_that_fetches_them(
    tmp_path: Path, name: str, content: str, command: str
) -> None:
    write(tmp_path / name, content)
    with pytest.raises(UserError) as refused:
        pack(tmp_path / name, tmp_path / "out")
    assert f"img2dataset --url_list {tmp_path}/{name}" in str(refused.value)
    assert command.format(folder=tmp_path) in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_the_command_packs_a_saved_dataset(tmp_path: Path) -> None:
    saved = write_saved(tmp_path / "saved", [described(0)])
    code, errors = rmoe("data", "pack", str(saved), str(tmp_path / "out"), "--split", "train")
    assert (code, "has no splits; leave --split out" in errors) == (2, True), errors
    code, errors = rmoe("data", "pack", str(saved), str(tmp_path / "out"), "--caption-column", "text")
    assert code == 0, errors
    assert packed_captions(tmp_path / "out") == ["number 0", "number 1"]
