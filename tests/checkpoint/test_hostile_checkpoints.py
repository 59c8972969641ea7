"""A prepared run folder executes nothing, whatever opens it, and is refused with a sentence that says why."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from rmoe_megatron.checkpoint.folders import find_checkpoint, list_checkpoints, verify, write_manifest
from rmoe_megatron.checkpoint.model_state import take_tensors, without_objects
from rmoe_megatron.checkpoint.unpickling import find_untrusted, read_metadata
from rmoe_megatron.errors import UserError
from tests.support.commands import rmoe
from tests.support.runs import make_run


class Touch:
    """Harmless, but it would leave a file behind if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    code, errors = rmoe("train", str(make_run(folder)), "training.steps=4", "training.sample_prompts=[]")
    assert code == 0, errors
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path


def checkpoint(folder: Path) -> Path:
    return list_checkpoints(folder / "run")[0].path


def sign(path: Path) -> None:
    """Give the changed folder a manifest that fits, as its author would."""
    write_manifest(path)


def poison_metadata(folder: Path) -> Path:
    executed, path = folder / "executed", checkpoint(folder)
    metadata = read_metadata(path)
    metadata.planner_data = Touch(executed)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(path)
    return executed


def poison_object(folder: Path) -> Path:
    """Put the payload where a byte object lies among the tensors."""
    executed, path = folder / "executed", checkpoint(folder)
    metadata = read_metadata(path)
    payload = io.BytesIO()
    torch.save(Touch(executed), payload)
    objects = [
        index
        for index in metadata.storage_data
        if type(metadata.state_dict_metadata[index.fqn]).__name__ == "BytesStorageMetadata"
    ]
    assert objects
    for index in objects:
        place = metadata.storage_data[index]
        file = path / place.relative_path
        place.offset, place.length = file.stat().st_size, len(payload.getvalue())
        with file.open("ab") as stream:
            stream.write(payload.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(path)
    return executed


@pytest.mark.parametrize("poison", [poison_metadata, poison_object])
@pytest.mark.parametrize("door", ["resume", "export", "base"])
def test_nothing_executes(folder: Path, finished: Path, poison: object, door: str) -> None:
    executed = poison(folder)  # type: ignore[operator]
    run = str(folder / "run")
    arguments = {
        "resume": ["train", "--resume", run, "training.steps=6"],
        "export": ["convert", "to-hf", run, str(folder / "model")],
        "base": [
            "train", str(finished / "config.yaml"), f"run_dir={folder}/new", f"fine_tuning.base={run}",
            "fine_tuning.trainable=all",
        ],
    }[door]  # fmt: skip
    code, errors = rmoe(*arguments)
    assert not executed.exists()
    assert code == 2
    assert "posix.mkdir" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("content", ["", "[]", "{}", "3", '{"config.yaml": 3}', '{"config.yaml": {}}'])
def test_a_manifest_that_lists_too_little_is_damage(folder: Path, content: str) -> None:
    (checkpoint(folder) / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        find_checkpoint(folder / "run", 4)


def test_a_file_that_the_manifest_does_not_list_is_damage(folder: Path) -> None:
    path = checkpoint(folder)
    shutil.copy(path / "__0_0.distcp", path / "__1_0.distcp")
    assert "__1_0.distcp is not in manifest.json" in str(verify(path))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "__1_0.distcp").unlink()
    del manifest[".metadata"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert ".metadata is not in manifest.json" in str(verify(path))


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps([1]), pickle.dumps(os.getcwd)])
def test_other_metadata_is_refused(folder: Path, content: bytes) -> None:
    path = checkpoint(folder)
    (path / ".metadata").write_bytes(content)
    sign(path)
    assert ".metadata" in str(verify(path))


# A tuple of tuples that share their parts, nested 40 deep: some hundred bytes, and 2^40 parts for who hashes or prints it.
DEEP = pickle.EMPTY_TUPLE + b"".join(
    pickle.MEMOIZE + pickle.BINGET + bytes([number]) + pickle.TUPLE2 for number in range(40)
)
DOUBLED = pickle.EMPTY_TUPLE + (pickle.DUP + pickle.TUPLE2) * 40
NAMES = b"torch.distributed.checkpoint.metadata\n"


@pytest.mark.parametrize(
    "content",
    [
        pickle.EMPTY_DICT + DEEP + pickle.NONE + pickle.SETITEM,
        pickle.EMPTY_DICT + DOUBLED + pickle.NONE + pickle.SETITEM,
        pickle.EMPTY_DICT + pickle.MARK + DEEP + pickle.NONE + pickle.SETITEMS,
        pickle.MARK + DEEP + pickle.NONE + pickle.DICT,
        pickle.EMPTY_SET + pickle.MARK + DEEP + pickle.ADDITEMS,
        pickle.MARK + DEEP + pickle.FROZENSET,
        pickle.GLOBAL + b"torch.serialization\n_get_layout\n" + DEEP + pickle.TUPLE1 + pickle.REDUCE,
        pickle.GLOBAL + NAMES + b"_MEM_FORMAT_ENCODING\n" + DEEP + pickle.TUPLE1 + pickle.REDUCE,
        pickle.MARK + pickle.GLOBAL + b"torch.serialization\n_get_layout\n" + DEEP + pickle.OBJ,
        DEEP,
        pickle.BYTEARRAY8 + b"\0\0\0\0\0\0\0\x40",
    ],
)  # fmt: skip
def test_metadata_that_would_take_for_ever_are_refused(folder: Path, content: bytes) -> None:
    path = checkpoint(folder)
    (path / ".metadata").write_bytes(pickle.PROTO + b"\4" + content + pickle.STOP)
    sign(path)
    assert f"{path} is not loaded (.metadata: " in str(verify(path))


def test_a_name_that_would_take_for_ever_is_refused(folder: Path) -> None:
    path = checkpoint(folder)
    metadata = read_metadata(path)
    name: object = ()
    for _ in range(40):
        name = (name, name)
    object.__setattr__(next(iter(metadata.storage_data)), "fqn", name)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(path)
    assert "a MetadataIndex is a key" in str(verify(path))


def place_of(metadata: Metadata, kind: type) -> Any:
    """The place of a tensor or of an object."""
    return next(
        place
        for index, place in metadata.storage_data.items()
        if isinstance(metadata.state_dict_metadata[index.fqn], kind)
    )


@pytest.mark.parametrize("kind", [TensorStorageMetadata, BytesStorageMetadata])
@pytest.mark.parametrize(
    "where", ["../../../outside", "/dev/zero", "sub/file", "..", "", "pipe", "link", "missing"]
)
def test_what_does_not_lie_in_the_folder_is_refused(folder: Path, kind: type, where: str) -> None:
    path = checkpoint(folder)
    os.mkfifo(folder / "outside")
    metadata = read_metadata(path)
    place_of(metadata, kind).relative_path = where
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(path)
    if where == "pipe":
        os.mkfifo(path / "pipe")
    if where == "link":
        (path / "link").symlink_to("../../../outside")
    assert str(path) in str(verify(path))
    assert find_untrusted(path) is not None
    with pytest.raises(UserError, match="has no complete checkpoint"):
        find_checkpoint(folder / "run", 4)


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1 << 40), (1 << 40, 10), (-1, 10), (0, -1), (None, 1), (0, "1")]
)
def test_a_tensor_that_ends_behind_its_file_is_refused(folder: Path, offset: object, length: object) -> None:
    path = checkpoint(folder)
    metadata = read_metadata(path)
    place = place_of(metadata, TensorStorageMetadata)
    place.offset, place.length = offset, length
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(path)
    assert "is not loaded" in str(verify(path))


def test_an_extra_state_that_holds_something_is_refused(folder: Path) -> None:
    """Transformer Engine's layers unpickle byte tensors of that name, which load as plain data."""
    path = checkpoint(folder)
    metadata, payload = read_metadata(path), io.BytesIO()
    torch.save([torch.frombuffer(bytearray(pickle.dumps(Touch(folder))), dtype=torch.uint8)], payload)
    names = [index for index in metadata.storage_data if index.fqn.endswith("_extra_state/shard_0_1")]
    assert names
    file = path / "extra.distcp"
    file.write_bytes(payload.getvalue())
    metadata.storage_data[names[0]] = _StorageInfo(file.name, 0, len(payload.getvalue()))
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(path)
    assert "the extra state of a layer holds something" in str(verify(path))


def test_nothing_but_tensors_reaches_a_layer() -> None:
    """A layer like Transformer Engine's, which pickles its extra state and unpickles what comes back."""

    class Layer(torch.nn.Linear):
        def get_extra_state(self) -> torch.Tensor:
            raise AssertionError

        def set_extra_state(self, state: object) -> None:
            raise AssertionError

    layers = torch.nn.ModuleList([Layer(2, 2)])
    take_tensors(layers, {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}, is_whole=True)
    assert layers[0].weight.eq(1).all()  # type: ignore[union-attr, operator]
    for wrong in (
        {"0.weight": torch.ones(2, 2)},
        {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2), "x": torch.ones(1)},
    ):
        with pytest.raises(UserError, match="does not hold the tensors of this model"):
            take_tensors(layers, wrong, is_whole=True)
    objects = {"a": ShardedObject("a", None, (1,), (0,)), "b": torch.ones(1)}
    assert without_objects(objects).keys() == {"b"}


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_metadata_are_read_or_refused(data: st.DataObject, finished: Path, tmp_path: Path) -> None:
    """Any bytes in the place of some of a pickle's: what is read has the types that it should have."""
    source = list_checkpoints(finished / "run")[0].path / ".metadata"
    content = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(
            st.binary(max_size=6)
            | st.sampled_from([b"2", b"\x86", b"R", b"b", b"\x94", b"h\x00", b"(", b"u", b"\x81"])
        )
        content[place : place + data.draw(st.integers(0, 6))] = piece
    (tmp_path / ".metadata").write_bytes(content)
    try:
        metadata = read_metadata(tmp_path)
    except pickle.UnpicklingError:
        return
    assert all(type(key) is str for key in metadata.state_dict_metadata)
    assert all(type(place.relative_path) is str for place in metadata.storage_data.values())
    assert "is not loaded" in str(find_untrusted(tmp_path))  # its files are not here
