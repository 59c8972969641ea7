"""A folder of pictures of any layout, each with the prompt that it was made of."""

import os
from pathlib import Path
from typing import Annotated, TypedDict

from pydantic import Field, TypeAdapter, with_config

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.picture_folder import SUFFIXES, require_pictures
from rmoe_megatron.files.untrusted import OPEN, lines_of, parse_json, read_text
from rmoe_megatron.inference.generation import ImageRequest, Picture
from rmoe_megatron.inference.provenance import read_record

MAX_BYTES = 1 << 28


@with_config(OPEN)
class _Line(TypedDict):
    file_name: Annotated[str, Field(min_length=1, max_length=4096)]
    text: Annotated[str, Field(min_length=1, max_length=100_000)]


LINE = TypeAdapter(_Line)


def read_pictures(
    folder: Path, captions: Path | None, allow_incomplete: bool
) -> tuple[list[Picture], dict[str, list[str]]]:
    """Return the pictures of a folder and of the folders in it with their prompts, and what is wrong with it.

    A prompt is that of the file of captions if there is one, and otherwise that which the picture says it was made of. Pictures of the
    same prompt have the same number, in the order of the prompts' texts.

    Args:
        captions: lines of JSON with ``file_name`` and ``text``, as Hugging Face's folders of images have them in ``metadata.jsonl``.
        allow_incomplete: score what the folder has; otherwise all has to be right.

    Raises:
        UserError: there are no pictures, a picture has no prompt, or the file of captions names another one.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; give one with pictures.")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if captions is not None:
        texts = _read_captions(captions, folder)
        wanted = list(texts)
    else:
        texts, wanted = {}, found
    if not wanted:
        raise UserError(f"There are no pictures in {folder}; give a folder with pictures.")
    usable, report = require_pictures(wanted, folder, allow_incomplete)
    prompts = {path: texts[path] if captions is not None else _own_prompt(path) for path in usable}
    numbers = {prompt: number for number, prompt in enumerate(sorted(set(prompts.values())))}
    pictures = [
        Picture(ImageRequest(prompts[path], numbers[prompts[path]], 0, path), None) for path in usable
    ]
    return pictures, report.problems()


def _read_captions(path: Path, folder: Path) -> dict[Path, str]:
    texts: dict[Path, str] = {}
    for number, line in enumerate(lines_of(read_text(path, MAX_BYTES, follow=True)), start=1):
        if not line.strip():
            continue
        entry = parse_json(line, LINE, f"Line {number} of {path}")
        place = Path(os.path.normpath(entry["file_name"]))
        if place.is_absolute() or place.parts[:1] == ("..",):
            raise UserError(
                f"Line {number} of {path} names {entry['file_name']!r:.80}, which is outside of the folder; name files in it."
            )
        if folder / place in texts:
            raise UserError(f"Line {number} of {path} names {place} again; leave one line for every picture.")
        texts[folder / place] = entry["text"]
    return texts


def _own_prompt(path: Path) -> str:
    prompt = (read_record(path) or {}).get("prompt") if path.suffix == ".png" else None
    if not isinstance(prompt, str) or not prompt:
        raise UserError(
            f"{path} does not say what it was made of; give --captions FILE with a line of JSON for every picture, as "
            '{"file_name": "a.png", "text": "a cat"}.'
        )
    return prompt
