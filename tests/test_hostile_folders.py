"""Every command over folders in which a file is a pipe, a device, a link to somewhere else or a hole of a terabyte.

It ends with one sentence or does its work; it never waits, never reads or writes without end, and changes nothing elsewhere.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rmoe_megatron.cli import main
from tests.support.sound_inputs import make_inputs

SECRET = "words-of-no-vocabulary-4711"
SECONDS = 120  # that a command may take; a hang has no end


def pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def device(path: Path, outside: Path) -> None:
    path.symlink_to("/dev/zero")


def link(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "precious")


def hole(path: Path, outside: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def folder(path: Path, outside: Path) -> None:
    path.mkdir()


PLANTS = (pipe, device, link, hole, folder)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    make_inputs(root)
    return root


# name -> (folder in which files are exchanged, arguments; OUT is a new folder)
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "inspect": ("run", ["inspect", "run"]),
    "train --resume": ("run", ["train", "--resume", "run", "training.steps=2"]),
    "train --check": ("run", ["train", "--check", "--resume", "run"]),
    "data show": ("run", ["data", "show", "run", "--draw", "0", "--out", "OUT"]),
    "convert to-hf": ("run", ["convert", "to-hf", "run", "OUT"]),
    "convert to-hf, imported": ("imported", ["convert", "to-hf", "imported", "OUT"]),
    "diagnose precision": ("imported", ["diagnose", "precision", "imported", "--out", "OUT"]),
    "train from a base": (
        "imported", ["train", "config.yaml", "run_dir=OUT", "fine_tuning.base=imported", "fine_tuning.trainable=all"],
    ),
    "sample": ("model", ["sample", "model", "--prompt", "a cat", "--steps", "1", "--out", "OUT"]),
    "convert from-hf": ("model", ["convert", "from-hf", "model", "OUT"]),
    "convert from-hf, dit": ("dit", ["convert", "from-hf", "dit", "OUT"]),
    "convert from-hf, a file": ("dit", ["convert", "from-hf", "dit/diffusion_pytorch_model.safetensors", "OUT"]),
    "convert from-facebook-dit": ("dit", ["convert", "from-facebook-dit", "dit/diffusion_pytorch_model.safetensors", "OUT"]),
    "data pack, a folder": ("pictures", ["data", "pack", "pictures", "OUT"]),
    "data pack, a table": ("table", ["data", "pack", "table/table.jsonl", "OUT"]),
    "data check": ("raw", ["data", "check", "raw", "OUT"]),
    "data index": ("raw", ["data", "index", "raw"]),
    "eval shapes": ("model", ["eval", "shapes", "model", "raw", "--out", "OUT"]),
    "eval compare": ("imported", ["eval", "compare", "imported/config.yaml", "imported", "--out", "OUT"]),
}  # fmt: skip


def snapshot(outside: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in outside.iterdir()}


@pytest.fixture
def limited() -> Iterator[None]:
    """Raise in the test if a command waits: opening a pipe is interrupted by the signal."""

    def stop(number: int, frame: object) -> None:
        raise AssertionError("the command does not end")

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def victims(root: Path) -> list[Path]:
    """The files of a folder, the small ones that say most first."""
    files = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    # Of many alike one is enough: vocabularies, shards of a checkpoint, events.
    kinds: dict[str, Path] = {}
    for path in files:
        kinds.setdefault(f"{path.parent.name.rstrip('_23')}/{path.suffix or path.name}", path)
    return list(kinds.values())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_meets_strange_files(
    command: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    limited: None,
) -> None:  # fmt: skip
    name, arguments = COMMANDS[command]
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text(SECRET)
    before = snapshot(tmp_path / "outside")
    monkeypatch.chdir(tmp_path)
    for each in ("config.yaml", "raw"):
        (tmp_path / each).symlink_to(sound / each)
    for number, victim in enumerate(victims(sound / name)):
        plant: Callable[[Path, Path], None] = PLANTS[number % len(PLANTS)]
        for left in (tmp_path / name, tmp_path / "OUT"):
            if left.is_symlink():
                left.unlink()
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(sound / name, tmp_path / name)
        path = tmp_path / name / victim
        path.unlink()
        plant(path, tmp_path / "outside")
        monkeypatch.setattr("sys.argv", ["rmoe", *arguments])
        signal.alarm(SECONDS)
        try:
            main()
            code: object = 0
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            signal.alarm(0)
        said = capfd.readouterr().err
        assert code in (0, 2), f"{victim} as {plant.__name__}: {said}"
        assert "Traceback" not in said
        assert snapshot(tmp_path / "outside") == before, victim
        for copy in (tmp_path / "OUT").rglob("*") if (tmp_path / "OUT").is_dir() else ():
            assert copy.is_dir() or SECRET.encode() not in copy.read_bytes(), copy
