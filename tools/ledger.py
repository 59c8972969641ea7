"""The ledger: one record for every measured figure of the project, with what made it.

A record is a JSON file ``tools/records/KIND/NAME.json``, where KIND is the kind of machine. It holds the command, the commit, the
date, the machine, the versions, the figures, and a fingerprint of the code that they depend on. A record is stale once that code
has changed, or once a version that it was measured with is pinned no more. ``tools/figures.py`` writes the figures into the pages
and lists what is stale; benchmarks write records with their option ``--record``.
"""

import argparse
import ast
import functools
import hashlib
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, TypedDict

import torch
from pydantic import ConfigDict, Field, TypeAdapter, with_config

from rmoe_megatron.distributed.launch import world_size
from rmoe_megatron.distributed.processor import bf16_instructions, bf16_is_fast, describe_processor
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.untrusted import read_json

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "tools" / "records"
PACKAGES = (
    "torch",
    "megatron-core",
    "diffusers",
    "transformers",
    "deepspeed",
)  # whose versions a record keeps
UNKNOWN_CODE = "unknown"  # in place of a fingerprint: the figure is older than the ledger

Figure = float | int | str


@with_config(ConfigDict(strict=True, extra="forbid"))
class Machine(TypedDict):
    """Where a figure was measured."""

    kind: str  # one baseline holds for all machines of a kind
    processor: str
    cores: int
    threads: int


@with_config(ConfigDict(strict=True, extra="forbid"))
class Record(TypedDict):
    """What one command measured."""

    command: str
    commit: Annotated[str, Field(pattern="^[0-9a-f]{7,40}(-dirty)?$")]
    date: Annotated[str, Field(pattern="^[0-9]{4}-[0-9]{2}-[0-9]{2}$")]
    machine: Machine
    versions: dict[str, str]
    figures: dict[str, Figure]
    code: dict[str, str]  # fingerprint of every path that the figures depend on, relative to the repository
    note: str


def machine(device: torch.device) -> Machine:
    """Return what a record says of this machine."""
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device).lower().replace(" ", "-")
    else:
        instructions = bf16_instructions() if bf16_is_fast() else ()
        kind = f"cpu-{instructions[0] if instructions else torch.backends.cpu.get_cpu_capability().lower()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        kind=kind, processor=describe_processor(device), cores=cores, threads=torch.get_num_threads()
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--record`` and ``--records`` to a benchmark's arguments."""
    parser.add_argument("--record", metavar="NAME", help="write the figures into the ledger under this name")
    parser.add_argument("--records", type=Path, default=RECORDS, help="another folder than the ledger's")


def write(
    arguments: argparse.Namespace,
    figures: Mapping[str, Figure],
    paths: Iterable[str],
    device: torch.device,
    row: str = "",
) -> None:
    """Write the record of a benchmark's run if its ``--record`` asks for one.

    Args:
        paths: of files and folders that the figures depend on, relative to the repository.
        row: what distinguishes this record from the others of the same run; it follows the name that ``--record`` gives.
    """
    if arguments.record:
        name = f"{arguments.record}-{row}" if row else arguments.record
        script, words = f"tools/{Path(sys.argv[0]).name}", shlex.join(_without_record(sys.argv[1:]))
        torchrun = f"torchrun --nproc-per-node {world_size()} " if world_size() > 1 else ""
        record = make(f"{torchrun}{script} {words}", machine(device), figures, paths)
        print(f"recorded in {save(arguments.records, name, record)}")


def make(
    command: str, place: Machine, figures: Mapping[str, Figure], paths: Iterable[str], note: str = ""
) -> Record:
    """Return the record of what ``command`` has just measured with the code as it is in this folder."""
    rounded = {
        name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in figures.items()
    }
    return Record(
        command=command,
        commit=_commit(),
        date=datetime.now(UTC).date().isoformat(),
        machine=place,
        versions={"python": platform.python_version()} | dict(_installed()),
        figures=rounded,
        code={path: fingerprint(ROOT / path) for path in sorted(paths)},
        note=note,
    )


def save(folder: Path, name: str, record: Record) -> Path:
    """Write a record in place of an older one of its name and kind of machine, and return its path."""
    path = folder / record["machine"]["kind"] / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, json.dumps(record, indent=1) + "\n")
    return path


def load(folder: Path = RECORDS) -> dict[str, Record]:
    """Return all records by ``KIND/NAME``, in the order of their names.

    Raises:
        UserError: a file is no record, or lies in the folder of another kind of machine.
    """
    found = {}
    for path in sorted(folder.glob("*/*.json")):
        record = read_json(path, TypeAdapter(Record))
        if record["machine"]["kind"] != path.parent.name:
            raise UserError(
                f"{path} is of the kind {record['machine']['kind']}; move it to the folder of that name."
            )
        found[f"{path.parent.name}/{path.stem}"] = record
    return found


def why_stale(record: Record) -> list[str]:
    """Return what has changed since a record was measured, in words; nothing if it is as today's code would measure it."""
    changed = []
    for path, known in record["code"].items():
        if known == UNKNOWN_CODE:
            changed.append(f"nothing is known of {path} as it was")
        elif fingerprint(ROOT / path) != known:
            changed.append(f"{path} has changed")
    pins = _pins()
    for package, measured in record["versions"].items():
        if package in pins and pins[package] != measured:
            changed.append(f"{package} was {measured} and is {pins[package]}")
    return changed


def fingerprint(path: Path) -> str:
    """Return a hash of a file, or of all files below a folder, that changes if what they do may change.

    The hash of a Python file leaves out comments, docstrings and line breaks. Pages (``.md``) are left out altogether.

    Raises:
        UserError: there is nothing at ``path``.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist, so no figure can depend on it; correct the record's paths.")
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and file.suffix not in (".md", ".pyc", ".png"):
            name, content = (
                file.relative_to(path.parent),
                _content_hash(file.read_bytes(), file.suffix == ".py"),
            )
            digest.update(f"{name}\0{content}\0".encode())
    return digest.hexdigest()[:16]


@functools.cache
def _content_hash(content: bytes, is_python: bool) -> str:
    counted = "\0".join(_code(content.decode())).encode() if is_python else content
    return hashlib.sha256(counted).hexdigest()


def _code(source: str) -> Iterator[str]:
    """Yield the tokens of a Python file without comments, docstrings and line breaks inside a statement."""
    dropped = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
    shape = {tokenize.NEWLINE: "newline", tokenize.INDENT: "indent", tokenize.DEDENT: "dedent"}
    docstrings = {
        (node.body[0].lineno, node.body[0].col_offset)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node) is not None
    }
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in dropped and not (token.type == tokenize.STRING and token.start in docstrings):
            yield shape.get(token.type, token.string)


def _without_record(words: list[str]) -> list[str]:
    kept, skip = [], False
    for word in words:
        if (
            not skip
            and not word.startswith(("--record=", "--records="))
            and word not in ("--record", "--records")
        ):
            kept.append(word)
        skip = not skip and word in ("--record", "--records")
    return kept


def _commit() -> str:
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    status = ["git", "status", "--porcelain", "--untracked-files=no"]
    changes = subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return f"{head}-dirty" if changes else head


def _installed() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _pins() -> dict[str, str]:
    lines = (ROOT / "tools" / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))
