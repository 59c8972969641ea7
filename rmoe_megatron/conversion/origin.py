"""Whose weights a run began with, and under which licence: written down by an import, told by the page of an export."""

import re
from pathlib import Path
from typing import TypedDict

from rmoe_megatron.checkpoint.folders import find_checkpoint, read_state
from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.yaml_text import parse_yaml
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.untrusted import read_text

PAGE = "README.md"  # of a repository of the hub, which begins with what the hub knows of it
LICENCE_KEYS = ("license", "license_name", "license_link")
MAX_LENGTH = 200  # of a name or a licence
MAX_BASES = 16  # that one run has begun with after another
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_ODD = re.compile(r"[^\w .:/+-]")  # which a page could take for more than text


class Origin(TypedDict, total=False):
    """Part of ``run_state.json`` of an imported run.

    Attributes:
        source: the repository of the hub, or the name of the folder or file.
        is_repository: whether it is a repository.
        licence: what its page says under :data:`LICENCE_KEYS`.
    """

    source: str
    is_repository: bool
    licence: dict[str, str]


def named(source: str) -> Origin:
    """Return the origin of a file or a folder of which no more is known than its name."""
    return Origin(source=_ODD.sub("_", source)[:MAX_LENGTH])


def read_origin(folder: Path, repository: str | None) -> Origin:
    """Return what a folder is called, and what its page says of its licence.

    Args:
        repository: the name of the hub repository that the folder is a copy of.
    """
    origin = named(repository or folder.resolve().name)
    origin["is_repository"] = repository is not None
    try:
        front = _FRONT.match(read_text(folder / PAGE, follow=True)) if (folder / PAGE).is_file() else None
        said = parse_yaml(front[1], str(folder / PAGE)) if front is not None else None
    except UserError:  # a page that says nothing of it
        return origin
    if isinstance(said, dict):
        licence = {key: said[key] for key in LICENCE_KEYS if isinstance(said.get(key), str)}
        if licence and all(len(value) <= MAX_LENGTH and not _ODD.search(value) for value in licence.values()):
            origin["licence"] = licence
    return origin


def origin_of(weights: RunWeights, base: Path | None = None) -> Origin:
    """Return what the first of the runs that a run began with was imported from; empty if it was imported from nowhere, or is not here.

    Args:
        base: where the run's base lies if not where its configuration says.
    """
    config, path = weights.config, weights.checkpoint.path
    for _ in range(MAX_BASES):
        state = read_state(path)
        if "source" in state:
            return Origin(
                source=state["source"],
                is_repository=state.get("is_repository", False),
                licence=state.get("licence", {}),
            )
        if config.fine_tuning is None:
            return Origin()
        try:
            path = find_checkpoint(base or Path(config.fine_tuning.base)).path
            config, base = load_config(path / "config.yaml", []), None
        except UserError:  # it has been removed
            return Origin()
    return Origin()
