"""Who answers DPG-Bench's questions: mPLUG of modelscope, as published, or a model of transformers."""

from typing import Any, Protocol, Self

import torch
from PIL import Image

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.question_answering import Answerer, Qwen3VL

MPLUG = "damo/mplug_visual-question-answering_coco_large_en"
QUESTION = "{} Answer yes or no."
WAYS = {"yes": ("Yes", "yes", " yes", " Yes"), "no": ("No", "no", " no", " No")}


class YesOrNo(Protocol):
    """Answers questions about images in a word."""

    def to(self, device: torch.device) -> Self:
        """Move the model."""
        ...

    def answer(self, image: Image.Image, question: str) -> str:
        """Return the answer, ``yes`` if it is that."""
        ...


class Mplug:
    """mPLUG-large through modelscope: the published model, whose answers are compared with ``yes`` as they are.

    Raises:
        UserError: modelscope is not installed.
    """

    def __init__(self, device: str) -> None:
        try:
            from modelscope.pipelines import pipeline
            from modelscope.utils.constant import Tasks
        except ModuleNotFoundError as error:
            raise UserError(
                "mPLUG needs modelscope (pip install modelscope); or name a Qwen3-VL with --answerer, whose scores cannot be "
                "compared with published ones."
            ) from error
        self.pipeline: Any = pipeline(Tasks.visual_question_answering, model=MPLUG, device=device)

    def to(self, device: torch.device) -> Self:
        """Return itself: modelscope holds the model, which is small, on the device that it was loaded to."""
        return self

    def answer(self, image: Image.Image, question: str) -> str:
        """Return the answer as it is."""
        return str(self.pipeline({"image": image, "question": question})["text"])


class Spoken:
    """A model that sees and speaks: yes if that is the more probable first word."""

    def __init__(self, answerer: Answerer) -> None:
        self.answerer = answerer

    def to(self, device: torch.device) -> Self:
        """Move the model."""
        self.answerer.to(device)
        return self

    def answer(self, image: Image.Image, question: str) -> str:
        """Return ``yes`` or ``no``."""
        probabilities = self.answerer.first_token(image, QUESTION.format(question))
        sums = {
            word: sum(
                float(probabilities[token]) for token in {self.answerer.first_token_of(way) for way in ways}
            )
            for word, ways in WAYS.items()
        }
        return "yes" if sums["yes"] > sums["no"] else "no"


def load_answerer(name: str, device: str) -> YesOrNo:
    """Return who answers.

    Args:
        name: ``mplug``, or folder or hub repository of a Qwen3-VL.
    """
    return Mplug(device) if name == "mplug" else Spoken(Qwen3VL(name))
