"""GenEval 2's prompts with their questions, read from its data file."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from pydantic import Field, TypeAdapter, with_config

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.untrusted import OPEN, lines_of, parse_json, read_text

# Of geneval2_data.jsonl in github.com/facebookresearch/GenEval2.
PUBLISHED_SHA256 = "09233adbc9f877fba205f1a20efa4a8640e7e62a91dfd55893562bed8a928e43"
MAX_BYTES = 1 << 26

type Skill = Literal["object", "attribute", "count", "position", "verb"]
Text = Annotated[str, Field(min_length=1, max_length=1000)]


@with_config(OPEN)
class Prompt(TypedDict):
    """A prompt, how many atoms it has, and for every atom a question, its right answer and its skill."""

    prompt: Text
    atom_count: Annotated[int, Field(ge=1, le=100)]
    vqa_list: Annotated[
        list[Annotated[list[Text], Field(min_length=2, max_length=2)]], Field(min_length=1, max_length=100)
    ]
    skills: Annotated[list[Skill], Field(min_length=1, max_length=100)]


PROMPT = TypeAdapter(Prompt)


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of ``geneval2_data.jsonl``.

    Raises:
        UserError: the file cannot be read, or a line is no prompt; names it.
    """
    prompts = []
    for number, line in enumerate(lines_of(read_text(path, MAX_BYTES, follow=True)), start=1):
        if not line.strip():
            continue
        where = f"Line {number} of {path}"
        prompt = parse_json(line, PROMPT, where)
        if len(prompt["vqa_list"]) != len(prompt["skills"]):
            raise UserError(
                f"{where} has {len(prompt['vqa_list'])} questions and {len(prompt['skills'])} skills; get the file again."
            )
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path} holds no prompt; give GenEval 2's geneval2_data.jsonl.")
    return prompts


def is_official(prompts: list[Prompt]) -> bool:
    """Whether they are the published set, word for word: their lines are those of its file."""
    lines = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
    return hashlib.sha256(lines.encode()).hexdigest() == PUBLISHED_SHA256
