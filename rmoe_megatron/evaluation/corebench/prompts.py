"""T2I-CoReBench's prompts with their questions, read from the twelve tables of its repository's folder ``data``."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, TypedDict

from pydantic import Field, TypeAdapter, with_config

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.untrusted import OPEN, parse_json, read_text

COMPOSITION = ("C-MI", "C-MA", "C-MR", "C-TR")
REASONING = ("R-LR", "R-BR", "R-HR", "R-PR", "R-GR", "R-AR", "R-CR", "R-RR")
DIMENSIONS = COMPOSITION + REASONING  # in the order of the published leaderboard
# Of prompts and questions of the tables in github.com/KlingTeam/T2I-CoReBench (1,080 prompts, 13,536 questions), see is_official.
PUBLISHED_SHA256 = "8fa151a4646084232420844b8c8e36ee11ae3e2b4eef832f2f1f39bd29ef433f"
MAX_BYTES = 1 << 26

Text = Annotated[str, Field(min_length=1, max_length=10_000)]
Name = Annotated[str, Field(pattern=r"^[CR]-[A-Z]{2}-[0-9]{1,6}$")]  # it names files


@with_config(OPEN)
class _Question(TypedDict):
    question: Text


@with_config(OPEN)
class _Entry(TypedDict):
    Prompt: Text
    Checklist: Annotated[list[_Question], Field(min_length=1, max_length=1000)]


TABLE = TypeAdapter(Annotated[dict[Name, _Entry], Field(min_length=1)])


@dataclass(frozen=True)
class Prompt:
    """A prompt, its published name (``C-MI-001``), its dimension, and the questions that are all answered with yes if it is kept to."""

    name: str
    dimension: str
    text: str
    questions: tuple[str, ...]


def read_prompts(folder: Path) -> list[Prompt]:
    """Return the prompts of all dimensions, in the order of the tables.

    Raises:
        UserError: a table is missing or malformed, or holds a prompt of another dimension; names it.
    """
    prompts = []
    for dimension in DIMENSIONS:
        path = folder / f"{dimension}.json"
        if not path.is_file():
            raise UserError(
                f"There is no {path}; give the folder data of github.com/KlingTeam/T2I-CoReBench, which holds the tables of all "
                f"{len(DIMENSIONS)} dimensions."
            )
        table = parse_json(read_text(path, MAX_BYTES, follow=True), TABLE, str(path))
        for name, entry in table.items():
            if not name.startswith(f"{dimension}-"):
                raise UserError(f"{path} holds {name}, which is of another dimension; get the file again.")
            questions = tuple(each["question"] for each in entry["Checklist"])
            prompts.append(Prompt(name, dimension, entry["Prompt"], questions))
    return prompts


def is_official(prompts: list[Prompt]) -> bool:
    """Whether they are the published set, word for word."""
    return words_digest(prompts) == PUBLISHED_SHA256


def words_digest(prompts: list[Prompt]) -> str:
    """Return the SHA-256 of all names, prompts and questions."""
    return hashlib.sha256(json.dumps([asdict(prompt) for prompt in prompts]).encode()).hexdigest()
