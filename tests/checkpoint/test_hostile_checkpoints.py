"""A prepared run folder executes nothing, whatever opens it, and is refused with a sentence that says why."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from rmoe_megatron.checkpoint.folders import find_checkpoint, list_checkpoints, verify, write_manifest
from rmoe_megatron.checkpoint.unpickling import read_metadata
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
