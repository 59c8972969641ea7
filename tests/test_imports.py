"""The package has one direction: a part imports only from parts before it, and some stand alone."""

import ast
from pathlib import Path

import pytest

import rmoe_megatron

ROOT = Path(rmoe_megatron.__file__).parent
# Folders and files at the top, each after all that it imports from.
ORDER = [
    "errors", "counter_rng", "versions", "hf", "files", "config", "distributed", "data", "diffusion", "model", "pretrained",
    "encoders", "checkpoint", "engine", "inference", "evaluation", "input_pipeline", "precompute", "training", "conversion",
    "inspection", "planning", "cli", "__main__",
]  # fmt: skip


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports, also late and for types."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def needed_parts(path: Path) -> set[str]:
    """Return the parts of the package that a file imports from, without its own."""
    names = {name.split(".")[1] for name in imports(path) if name.startswith("rmoe_megatron.")}
    return names & set(ORDER) - {part(path)}


FILES = sorted(ROOT.rglob("*.py"))


def test_every_part_has_a_place() -> None:
    assert {part(path) for path in FILES} == {*ORDER, "__init__"}
    assert len(FILES) > 100


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_parts_before_its_own(path: Path) -> None:
    if path == ROOT / "__init__.py":
        return
    before = set(ORDER[: ORDER.index(part(path))])
    assert needed_parts(path) <= before


def test_what_users_of_exported_models_load_stands_alone() -> None:
    for path in (ROOT / "hf").glob("*.py"):
        assert needed_parts(path) == set(), path


@pytest.mark.parametrize(
    "folder",
    ["config", "data", "diffusion", "encoders", "evaluation", "files", "hf", "inference", "pretrained"],
)
def test_megatron_core_stays_in_model_engine_and_checkpoint(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        assert not [name for name in imports(path) if name.partition(".")[0] == "megatron"], path
