"""What the toy shapes set is made of: shapes, colors, their words, and the pairs kept out of training."""

from enum import StrEnum

IMAGE_SIZE = 32  # pixels, height and width
BACKGROUND = (40, 40, 40)  # dark gray; a blend of it with a color keeps the color's hue

SHAPES = ("circle", "square", "triangle", "cross", "diamond")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40),
    "green": (40, 190, 60),
    "blue": (40, 70, 240),
    "yellow": (240, 220, 40),
    "purple": (200, 40, 220),
    "cyan": (40, 210, 220),
    "white": (240, 240, 240),
}
PLURALS = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "cross": "crosses",
    "diamond": "diamonds",
}
NUMBERS = ("zero", "one", "two", "three", "four")

Pair = tuple[str, str]  # (color, shape), in the order of the words in a caption

# One color of every shape, all different, so that every shape and every color is still seen in training.
HELDOUT_PAIRS: tuple[Pair, ...] = (
    ("blue", "circle"),
    ("yellow", "square"),
    ("green", "triangle"),
    ("red", "cross"),
    ("purple", "diamond"),
)


class Skill(StrEnum):
    """The six skills of GenEval (arXiv 2310.11513)."""

    single_object = "single_object"
    two_object = "two_object"
    counting = "counting"
    colors = "colors"
    position = "position"
    color_attr = "color_attr"


# Skills whose captions name a color; only they can ask for a held-out pair.
COLOR_SKILLS = (Skill.counting, Skill.colors, Skill.position, Skill.color_attr)
RELATIONS = ("left of", "right of", "above", "below")
