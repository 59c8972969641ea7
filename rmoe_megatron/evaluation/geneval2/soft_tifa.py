"""Soft-TIFA: how probable the right answer to the question of every atom is.

The score of an atom is the probability that the model's answer begins with the right word, over the ways to write it. Atoms are
summed up by their arithmetic mean, prompts by the geometric mean of their atoms.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import gmean

from rmoe_megatron.evaluation.geneval2.prompts import Prompt
from rmoe_megatron.evaluation.question_answering import Answerer
from rmoe_megatron.evaluation.rule_set import RuleSet

QUESTION = "{} Answer in one word."
COUNTING = "How many"
YES = ("Yes", "yes", " yes", " Yes")
DIGITS = {
    "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
    "ten": "10",
}  # fmt: skip
QUIRKS = [
    "of every way to write an answer only the first token counts, also where other answers begin with it (a space before a digit)",
    "a token that two ways to write an answer begin with counts twice, so that a score can exceed 1",
    "a number above ten is also looked for as the word 'other'",
]


def ways_to_write(question: str, answer: str, protocol: RuleSet) -> list[str]:
    """Return the texts that count as the right answer; every question that is no count is answered with yes."""
    if not question.startswith(COUNTING):
        return list(YES)
    digits = DIGITS.get(answer, "other" if protocol is RuleSet.official else answer)
    return [f"{space}{text}" for text in (answer, answer.capitalize(), digits) for space in ("", " ")]


def score_atom(
    answerer: Answerer, image: Image.Image, question: str, answer: str, protocol: RuleSet
) -> float:
    """Return the probability of the right answer to one question."""
    probabilities = answerer.first_token(image, QUESTION.format(question))
    ways = ways_to_write(question, answer, protocol)
    tokens = [answerer.first_token_of(way) for way in ways]
    if protocol is RuleSet.fixed:
        # Each token once, and none that is only a space.
        tokens = [token for token in dict.fromkeys(tokens) if answerer.spell(token).strip()]
    return float(sum(float(probabilities[token]) for token in tokens))


def summarise(scores: Sequence[Sequence[float]], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return the scores in percent by skill (arithmetic) and by atomicity (geometric)."""
    by_skill: dict[str, list[float]] = defaultdict(list)
    by_atomicity: dict[int, list[float]] = defaultdict(list)
    for atoms, prompt in zip(scores, prompts, strict=True):
        by_atomicity[prompt["atom_count"]].append(geometric_mean(atoms))
        for atom, skill in zip(atoms, prompt["skills"], strict=True):
            by_skill[skill].append(atom)
    return {
        "skills_am": {skill: 100 * float(np.mean(atoms)) for skill, atoms in sorted(by_skill.items())},
        "atomicities_gm": {
            str(count): 100 * float(np.mean(each)) for count, each in sorted(by_atomicity.items())
        },
    }


def geometric_mean(atoms: Sequence[float]) -> float:
    """Return the geometric mean; an atom of probability zero makes it zero."""
    with np.errstate(divide="ignore"):
        return float(gmean(atoms))
