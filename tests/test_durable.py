"""Folders that are there whole or not at all."""

import os
from pathlib import Path

import pytest

from rmoe_megatron import durable
from rmoe_megatron.errors import UserError


def test_a_folder_is_there_when_it_is_finished(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "final"
    with durable.building(final) as partial:
        (partial / "file").write_text("content")
        assert not final.exists()
    assert [path.name for path in final.parent.iterdir()] == ["final"]
    assert (final / "file").read_text() == "content"


def test_a_folder_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    final = tmp_path / "final"

    def interrupt() -> None:
        with durable.building(final) as partial:
            (partial / "file").write_text("content")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "link", "pipe"])
def test_what_an_earlier_attempt_left_is_removed(tmp_path: Path, kind: str) -> None:
    final, left = tmp_path / "final", durable.unfinished(tmp_path / "final")
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("")
    if kind == "folder":
        (left / "inner").mkdir(parents=True)
    elif kind == "file":
        left.write_text("")
    elif kind == "link":
        left.symlink_to(kept)
    else:
        os.mkfifo(left)
    with durable.building(final) as partial:
        assert list(partial.iterdir()) == []
        assert not partial.is_symlink()
    assert final.is_dir()
    assert (kept / "file").is_file()


def test_only_a_replacement_takes_the_place_of_something(tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    with durable.building(final):  # an empty folder may be there
        pass
    (final / "old").write_text("")
    with pytest.raises(OSError, match="not empty"), durable.building(final):
        pass
    assert (final / "old").is_file()
    with durable.building(final, replace=True) as partial:
        (partial / "new").write_text("")
    assert [path.name for path in final.iterdir()] == ["new"]


def test_an_output_must_be_empty_and_writable(tmp_path: Path) -> None:
    durable.require_empty(tmp_path / "new", "The output")
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="is not an empty folder"):
            durable.require_empty(wrong, "The output")
    with pytest.raises(UserError, match="is a file"):
        durable.require_empty(tmp_path / "file" / "new", "The output")


def test_a_replacement_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "final"
    final.mkdir()
    (final / "old").write_text("")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == final:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    def build() -> None:
        with durable.building(final, replace=True) as partial:
            (partial / "new").write_text("")

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output"):
        build()
    monkeypatch.undo()
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"old", "new"}
    build()
    assert [path.name for path in final.iterdir()] == ["new"]
