"""Scores from verdicts: the mean over images per skill, and overall the mean of the skills, as in GenEval."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rmoe_megatron.data.shapes.vocabulary import Skill
from rmoe_megatron.evaluation.shapes.rules import Verdict


@dataclass(frozen=True)
class Judgement:
    """The verdict on one generated image."""

    split: str
    skill: Skill
    caption: str
    verdict: Verdict


def aggregate(judgements: Iterable[Judgement]) -> dict[str, Any]:
    """Return the scores of one split as JSON.

    ``skills`` maps each skill that occurs to its ``score`` (share of correct images) and its number of ``images``;
    ``overall`` is the mean of the skills' scores, whatever their numbers of images, or None without any image.
    """
    verdicts: dict[Skill, list[bool]] = {skill: [] for skill in Skill}
    for judgement in judgements:
        verdicts[judgement.skill].append(judgement.verdict.correct)
    skills = {
        skill.value: {"score": sum(correct) / len(correct), "images": len(correct)}
        for skill, correct in verdicts.items()
        if correct
    }
    scores = [entry["score"] for entry in skills.values()]
    return {
        "overall": sum(scores) / len(scores) if scores else None,
        "images": sum(int(entry["images"]) for entry in skills.values()),
        "skills": skills,
    }
