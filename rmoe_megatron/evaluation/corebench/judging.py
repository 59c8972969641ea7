"""How a question of T2I-CoReBench is put to Qwen3-VL, and what of its answer counts.

The published wording of the judge's instructions is that benchmark's own text and is not part of this package: whoever has it gives it
as a file. Without one the judge gets the wording below, which is ours, and the result is not called official.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.corebench.prompts import Prompt
from rmoe_megatron.evaluation.question_answering import Qwen3VL
from rmoe_megatron.evaluation.rule_set import RuleSet
from rmoe_megatron.files.untrusted import read_text
from rmoe_megatron.inference.provenance import Record

# The text TEMPLATE of evaluate.py in github.com/KlingTeam/T2I-CoReBench (March 2026), without the space around it.
OFFICIAL_WORDING_SHA256 = "c06537bb64a60a3def400b3e968b0af9f3b41a3359c6ee76226912c4d603cf2e"
OUR_WORDING = """\
You check pictures that a program has made from a description. You are shown one picture, the description that it was made from, and a \
question about the picture.

Answer from what can be seen in the picture alone. The description only tells what the words of the question stand for: what it asks \
for may be missing from the picture.

Answer yes if the picture shows beyond doubt that it is so. Answer no in every other case: where the thing is not there, is hidden, cut \
off or too unclear to be told, or where it takes a guess. If the question sets a condition, answer yes only where the condition and what \
follows from it are both seen.

Write one word in small letters, yes or no, and nothing else."""
MAX_WORDING = 1 << 16  # bytes
# The published judges that are Qwen3-VL and that its leaderboard has scores of.
JUDGES = ("Qwen/Qwen3-VL-30B-A3B-Thinking", "Qwen/Qwen3-VL-32B-Thinking", "Qwen/Qwen3-VL-8B-Thinking")
ROUNDS = (
    512,
    2048,
    8192,
)  # tokens of an answer; a longer round is for those that had said nothing in the one before
REPETITION_PENALTY = 1.05
TOGETHER = 16  # questions about a picture that are answered at a time
TOKENS_OF_A_PICTURE = (4, 16384)  # the fewest and the most
THOUGHT = "</think>\n\n"  # ends what a judge that thinks says before its answer
QUIRKS = [
    "an answer counts by small letters alone: 'Yes' is neither yes nor no",
    "an answer with both words is a yes",
    "a question whose answer is neither yes nor no is left out, and so is an image without any answer",
]


@dataclass(frozen=True)
class Wording:
    """The judge's instructions: ``official``, ``ours`` or ``given``, which is a text of the user's."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """The SHA-256 of the text, as hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_wording(path: Path | None) -> Wording:
    """Return the wording of a text file, or ours if there is none; space around it does not count.

    Raises:
        UserError: the file is no text, or is empty.
    """
    if path is None:
        return Wording("ours", OUR_WORDING)
    text = read_text(path, MAX_WORDING, follow=True).removeprefix("\ufeff").replace("\r\n", "\n").strip()
    if not text:
        raise UserError(f"{path} is empty; give a file with the judge's instructions (--judge-prompt).")
    given = Wording("given", text)
    return Wording("official", text) if given.sha256 == OFFICIAL_WORDING_SHA256 else given


def judging_record(wording: Wording) -> Record:
    """Return what an answer depends on besides the judge's weights, the picture and the question."""
    return {
        "wording": wording.name,
        "wording_sha256": wording.sha256,
        "rounds_of_tokens": list(ROUNDS),
        "repetition_penalty": REPETITION_PENALTY,
        "questions_together": TOGETHER,
    }


def ask(
    answerer: Qwen3VL, image: Image.Image, prompt: Prompt, wording: Wording, is_made_here: bool
) -> list[str]:
    """Return the judge's answers to all questions about a picture of a prompt, without what it thought before.

    Decoding is greedy.

    Args:
        is_made_here: cut off the black borders, as the published code does where it makes pictures, and not where it judges them.
    """
    shown = _as_published(image, answerer.processor, is_made_here)
    before = f"<|im_start|>system\n\n{wording.text}\n<|im_end|>\n<|im_start|>user\n"
    after = [
        f'Prompt: "{prompt.text}"\nQuestion: "{question}"<|im_end|>\n<|im_start|>assistant\n'
        + ("<think>\n" if answerer.thinks else "")
        for question in prompt.questions
    ]
    answers = []
    for start in range(0, len(after), TOGETHER):
        found = answerer.generate(
            shown, before, after[start : start + TOGETHER], ROUNDS[-1], REPETITION_PENALTY
        )
        answers += [answer_of(tokens, answerer.tokenizer.decode, answerer.thinks) for tokens in found]
    return answers


def _as_published(image: Image.Image, processor: Any, is_made_here: bool) -> Image.Image:
    """Return a picture as Qwen's own code hands it on: on white where it is transparent, its sides multiples of the processor's patches."""
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        image = white
    image = image.convert("RGB")
    if is_made_here:
        image = image.crop(image.getbbox())
    factor = processor.patch_size * processor.merge_size
    fewest, most = (number * factor**2 for number in TOKENS_OF_A_PICTURE)
    height, width = smart_resize(image.height, image.width, factor, fewest, most)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def answer_of(tokens: Sequence[int], decode: Callable[..., str], thinks: bool) -> str:
    """Return the answer in what a judge wrote: of the first round of so many tokens in which it says anything.

    Greedy decoding writes in a longer round what it wrote in a shorter one, and goes on.

    Args:
        decode: from tokens to text.
        thinks: what stands before the end of its thoughts is no answer.
    """
    answer = ""
    for limit in ROUNDS:
        text = decode(list(tokens[:limit]), skip_special_tokens=True)
        answer = text if not thinks else text.split(THOUGHT)[-1] if THOUGHT in text else ""
        if answer.strip():
            break
    return answer


def verdict(answer: str, protocol: RuleSet) -> bool | None:
    """Return whether an answer is yes; the published rules know answers that are neither yes nor no, which are None."""
    if protocol is RuleSet.official:
        if re.search(r"\byes\b", answer):
            return True
        return False if re.search(r"\bno\b", answer) else None
    words = set(re.findall(r"\b(yes|no)\b", answer.lower()))
    return words == {"yes"}
