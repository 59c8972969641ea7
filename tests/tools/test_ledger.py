"""The ledger: what makes a figure stale, and what does not."""

import argparse
from pathlib import Path

import ledger
import pytest
import torch
from ledger import Record
from pydantic import TypeAdapter

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.untrusted import check_value

CODE = '''"""A module."""


def twice(x: int) -> int:
    """Return the double."""
    return 2 * x
'''


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one file of code and one pin."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "twice.py").write_text(CODE)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "constraints.txt").write_text("# pins\ntorch==2.15.0\nnumpy==2.5.5\n")
    monkeypatch.setattr(ledger, "ROOT", tmp_path)
    return tmp_path


def record_of(repository: Path) -> Record:
    return Record(
        command="tools/benchmark_step.py",
        commit="0123abc",
        date="2026-11-29",
        machine={"kind": "cpu-avx2", "processor": "a CPU", "cores": 2, "threads": 2},
        versions={"python": "3.12.1", "torch": "2.15.0"},
        figures={"ratio": 0.5},
        code={"model": ledger.fingerprint(repository / "model")},
        note="",
    )


def test_code_that_changes_makes_a_record_stale(repository: Path) -> None:
    record = record_of(repository)
    assert ledger.why_stale(record) == []
    (repository / "model" / "twice.py").write_text(CODE.replace("2 * x", "x + x"))
    assert ledger.why_stale(record) == ["model has changed"]


@pytest.mark.parametrize(
    "change",
    [
        lambda code: code.replace("Return the double.", "Return two times the argument."),
        lambda code: code.replace("2 * x", "2 * x  # the double"),
        lambda code: code.replace("return 2 * x", "return (\n        2 * x\n    )").replace("(\n", "\\\n").replace("\n    )", ""),
        lambda code: "\n\n" + code,
    ],
    ids=["docstring", "comment", "line break", "empty lines"],
)  # fmt: skip
def test_words_and_line_breaks_do_not(repository: Path, change) -> None:  # type: ignore[no-untyped-def]
    record = record_of(repository)
    (repository / "model" / "twice.py").write_text(change(CODE))
    (repository / "model" / "README.md").write_text("A page.")
    assert ledger.why_stale(record) == []


@pytest.mark.parametrize("name", ["twice.py", "more.py", "settings.yaml"])
def test_files_that_come_and_go_make_it_stale(repository: Path, name: str) -> None:
    record = record_of(repository)
    file = repository / "model" / name
    file.unlink() if file.exists() else file.write_text("")
    assert ledger.why_stale(record) == ["model has changed"]


def test_a_string_that_is_no_docstring_is_code(repository: Path) -> None:
    file = repository / "model" / "twice.py"
    file.write_text('NAME = "a"\n')
    first = ledger.fingerprint(file)
    file.write_text('NAME = "b"\n')
    assert ledger.fingerprint(file) != first


def test_another_pin_makes_it_stale(repository: Path) -> None:
    record = record_of(repository)
    (repository / "tools" / "constraints.txt").write_text("torch==2.16.0\nnumpy==2.6.0\n")
    assert ledger.why_stale(record) == ["torch was 2.15.0 and is 2.16.0"]


def test_a_figure_older_than_the_ledger_is_stale(repository: Path) -> None:
    record = record_of(repository) | {"code": {"model": ledger.UNKNOWN_CODE}}
    assert ledger.why_stale(record) == ["nothing is known of model as it was"]  # type: ignore[arg-type]


def test_nothing_depends_on_what_is_not_there(repository: Path) -> None:
    with pytest.raises(UserError, match="modell does not exist"):
        ledger.fingerprint(repository / "modell")


def test_a_record_is_found_by_kind_and_name(repository: Path) -> None:
    record = record_of(repository)
    ledger.save(repository / "records", "step", record)
    assert ledger.load(repository / "records") == {"cpu-avx2/step": record}
    (repository / "records" / "cpu-avx2").rename(repository / "records" / "cpu-avx512")
    with pytest.raises(UserError, match=r"is of the kind cpu-avx2; move it"):
        ledger.load(repository / "records")


@pytest.mark.parametrize("key", ["commit", "date"])
def test_what_is_no_record_is_refused(repository: Path, key: str) -> None:
    with pytest.raises(UserError, match=key):
        check_value({**record_of(repository), key: "yesterday"}, TypeAdapter(Record), "record")


def test_every_record_of_the_project_depends_on_something_that_is_there() -> None:
    for name, record in ledger.load().items():
        assert record["code"], name
        assert all((ledger.ROOT / path).exists() for path in record["code"]), name


def test_the_rows_of_one_run_are_records_of_their_own(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "_commit", lambda: "0123abc")
    monkeypatch.setattr("sys.argv", ["tools/benchmark_widths.py", "--widths", "768", "--record", "width"])
    monkeypatch.setattr(ledger, "world_size", lambda: 2)
    arguments = argparse.Namespace(record="width", records=repository / "records")
    for tokens in (256, 1024):
        ledger.write(arguments, {"tokens": tokens}, ["model"], torch.device("cpu"), f"768-{tokens}")
    found = {name.split("/")[1]: record for name, record in ledger.load(repository / "records").items()}
    assert {name: record["figures"] for name, record in found.items()} == {
        "width-768-256": {"tokens": 256},
        "width-768-1024": {"tokens": 1024},
    }
    command = "torchrun --nproc-per-node 2 tools/benchmark_widths.py --widths 768"
    assert {record["command"] for record in found.values()} == {command}
