"""GenEval's prompts with what they ask for: read from its metadata, or made by the published recipe."""

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, cast

import numpy as np
from pydantic import Field, TypeAdapter, with_config

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.untrusted import OPEN, lines_of, parse_json, read_text

# COCO's classes in their order, as GenEval's prompts call them.
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant",
    "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra",
    "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork",
    "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut",
    "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse",
    "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
NUMBERS = ("zero", "one", "two", "three", "four")
RECIPE_SEED = 43  # of the published prompts
MAX_BYTES = 1 << 26

type Tag = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]


type Color = Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]

# So many objects of a class, of a colour, at a place relative to those of an earlier requirement: [relation, its number].
Requirement = TypedDict(
    "Requirement",
    {
        "class": str,
        "count": Annotated[int, Field(ge=1, le=1000)],
        "color": NotRequired[Color],
        "position": NotRequired[Annotated[list[Any], Field(min_length=2, max_length=2)]],
    },
)
with_config(OPEN)(Requirement)


@with_config(OPEN)
class Metadata(TypedDict):
    """What a prompt asks for: all of ``include``, and none of ``exclude``."""

    tag: Tag
    prompt: Annotated[str, Field(min_length=1, max_length=1000)]
    include: Annotated[list[Requirement], Field(min_length=1, max_length=16)]
    exclude: NotRequired[Annotated[list[Requirement], Field(max_length=16)]]


METADATA = TypeAdapter(Metadata)


def read_metadata(path: Path) -> list[Metadata]:
    """Return the prompts of a file of GenEval's form, one JSON object a line.

    Raises:
        UserError: the file cannot be read, or a line is malformed; names the line.
    """
    prompts = []
    for number, line in enumerate(lines_of(read_text(path, MAX_BYTES, follow=True)), start=1):
        if line.strip():
            where = f"Line {number} of {path}"
            prompts.append(_checked(parse_json(line, METADATA, where), where))
    if not prompts:
        raise UserError(f"{path} holds no prompt; give GenEval's evaluation_metadata.jsonl.")
    return prompts


def _checked(metadata: Metadata, where: str) -> Metadata:
    for number, requirement in enumerate([*metadata["include"], *metadata.get("exclude", [])]):
        if requirement["class"] not in CLASSES:
            raise UserError(
                f"{where} asks for the class {requirement['class']!r:.60}, which the detector does not know."
            )
        if "position" not in requirement:
            continue
        relation, target = requirement["position"]
        if relation not in POSITIONS or not isinstance(target, int) or not 0 <= target < number:
            raise UserError(f"{where} has a position that is none: {requirement['position']!r:.60}.")
    return metadata


def is_official(prompts: list[Metadata]) -> bool:
    """Whether they are the published set, word for word."""
    return prompts == make_prompts()


def make_prompts(seed: int = RECIPE_SEED, per_task: int = 100) -> list[Metadata]:
    """Make prompts by the published recipe; its seed gives the published set.

    Every class once; then ``per_task`` draws of each other task, of which duplicates are left out. No prompt asks for the
    colour of a person.
    """
    rng = np.random.default_rng(seed)
    samples = [
        _sample("single_object", f"a photo of {_with_article(CLASSES[index])}", [_some(index)])
        for index in rng.choice(len(CLASSES), size=len(CLASSES), replace=False)
    ]
    for make in (_two_objects, _counting, _colors, _position, _color_attribution):
        samples += [make(rng) for _ in range(per_task)]
    unique: dict[str, Metadata] = {}
    for sample in samples:
        unique.setdefault(repr(sample), sample)
    return list(unique.values())


def _two_objects(rng: np.random.Generator) -> Metadata:
    first, second = rng.choice(len(CLASSES), size=2, replace=False)
    prompt = f"a photo of {_with_article(CLASSES[first])} and {_with_article(CLASSES[second])}"
    return _sample("two_object", prompt, [_some(first), _some(second)])


def _counting(rng: np.random.Generator) -> Metadata:
    index, count = rng.choice(len(CLASSES)), int(rng.integers(2, 4, endpoint=True))
    name = CLASSES[index]
    plural = f"{name}es" if name.endswith("s") else f"{name}s"
    sample = _sample("counting", f"a photo of {NUMBERS[count]} {plural}", [_some(index, count=count)])
    # In the place that the published files give it.
    return {
        "tag": sample["tag"],
        "include": sample["include"],
        "exclude": [_some(index, count=count + 1)],
        "prompt": sample["prompt"],
    }


def _colors(rng: np.random.Generator) -> Metadata:
    index = rng.choice(len(CLASSES) - 1) + 1  # the person is the first
    color = COLORS[rng.choice(len(COLORS))]
    return _sample(
        "colors", f"a photo of {_with_article(color)} {CLASSES[index]}", [_some(index, color=color)]
    )


def _position(rng: np.random.Generator) -> Metadata:
    first, second = rng.choice(len(CLASSES), size=2, replace=False)
    relation = POSITIONS[rng.choice(len(POSITIONS))]
    prompt = f"a photo of {_with_article(CLASSES[first])} {relation} {_with_article(CLASSES[second])}"
    return _sample("position", prompt, [_some(second), _some(first, position=[relation, 0])])


def _color_attribution(rng: np.random.Generator) -> Metadata:
    objects = rng.choice(len(CLASSES) - 1, size=2, replace=False) + 1
    colors = [COLORS[index] for index in rng.choice(len(COLORS), size=2, replace=False)]
    words = [f"{_with_article(color)} {CLASSES[index]}" for color, index in zip(colors, objects, strict=True)]
    included = [_some(index, color=color) for color, index in zip(colors, objects, strict=True)]
    return _sample("color_attr", f"a photo of {' and '.join(words)}", included)


def _sample(tag: Tag, prompt: str, include: list[Requirement]) -> Metadata:
    return {"tag": tag, "include": include, "prompt": prompt}


def _some(index: int, count: int = 1, **more: Any) -> Requirement:
    return cast(Requirement, {"class": CLASSES[index], "count": count, **more})


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
