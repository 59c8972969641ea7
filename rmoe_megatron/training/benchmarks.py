"""What a run can be scored by between its steps: the prompts to draw, who judges a picture, and how the verdicts are summed up.

A picture is drawn once for every prompt, so that scores are of one image a prompt, and of the first ``limit`` prompts with the tasks in
turn: they show how a run goes and are not the benchmark's. Rules, questions and sums are those of ``rmoe eval``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rmoe_megatron.config.run import EvaluationConfig
from rmoe_megatron.data.shapes.build import make_scene
from rmoe_megatron.data.shapes.vocabulary import HELDOUT_PAIRS, IMAGE_SIZE
from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.early_judge import Judge
from rmoe_megatron.evaluation.limits import take_in_turn
from rmoe_megatron.evaluation.rule_set import RuleSet
from rmoe_megatron.files.images import labelled_grid, stacked
from rmoe_megatron.files.untrusted import lines_of, read_text
from rmoe_megatron.pretrained.hub import present_folder
from rmoe_megatron.pretrained.model_files import Choice, judge_parts

SET_SEED = 0  # of the scenes of shapes: those of `rmoe data build-shapes` by default
EXAMPLES = 6  # best and worst pictures
MAX_PROMPTS = 1 << 26  # bytes of a file of prompts

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Evaluated:
    """What a benchmark gives: metrics by the names they are logged by, and a picture of examples."""

    metrics: dict[str, float]
    picture: Image.Image


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as a run needs it.

    Attributes:
        captions: the prompts, a picture of each is drawn.
        judge: from the judge's models (None if it has none), the number of a prompt and its picture uint8 [H, W, 3] to a verdict that JSON
            has; every rank judges pictures of its own.
        summarise: from all verdicts and pictures uint8 [N, H, W, 3] to what is logged; rank 0 does.
        load: loads the judge's models; None if there are none.
        models: names of the models that have to be here, with the parts that are needed of each.
        sides: whether pictures of a side, in pixels, can be judged, and what to say if not.
    """

    captions: list[str]
    judge: Callable[[Any, int, Images], Any]
    summarise: Callable[[Sequence[Any], Images], Evaluated]
    load: Callable[[], Judge] | None = None
    models: tuple[tuple[str, Choice], ...] = ()
    sides: tuple[Callable[[int], bool], str] = (lambda side: True, "")


def open_benchmark(settings: EvaluationConfig) -> Benchmark:
    """Return a benchmark with its prompts; its judges are not loaded.

    Raises:
        UserError: its table or folder of prompts cannot be read.
    """
    return _BENCHMARKS[settings.name](settings)


def check_benchmark(settings: EvaluationConfig, side: int, where: str) -> None:
    """Check that a benchmark's prompts and judges are here, and that it judges pictures of this side.

    Args:
        side: a picture's side in pixels.
        where: what messages call its section.

    Raises:
        UserError: something is missing; says how to fetch it.
    """
    benchmark = open_benchmark(settings)
    is_judged, otherwise = benchmark.sides
    if not is_judged(side):
        raise UserError(
            f"{where} has {settings.name}, {otherwise}, but the model makes {side} x {side}; leave it out."
        )
    for name, choice in benchmark.models:
        present_folder(name, f"{where}.judges", choice)


def _shapes(settings: EvaluationConfig) -> Benchmark:
    """The toy shapes by GenEval's rules: always the same scenes of its validation splits, the skills in turn."""
    from rmoe_megatron.evaluation.shapes.detector import detect
    from rmoe_megatron.evaluation.shapes.evaluate import SPLITS, score
    from rmoe_megatron.evaluation.shapes.report import JudgedImage, examples
    from rmoe_megatron.evaluation.shapes.rules import Verdict, judge

    scenes = [
        (split, make_scene(SET_SEED, folder, number, frozenset(HELDOUT_PAIRS)))
        for split, folder in SPLITS.items()
        for number in range(settings.limit)
    ]

    def verdict(models: None, number: int, image: Images) -> list[Any]:
        found = judge(detect(image), scenes[number][1].requirements)
        return [found.correct, found.reason]

    def summarise(verdicts: Sequence[Any], images: Images) -> Evaluated:
        judged = [
            JudgedImage(split, scene.skill, scene.caption, image, Verdict(*said))
            for (split, scene), image, said in zip(scenes, images, verdicts, strict=True)
        ]
        metrics = {}
        for split in SPLITS:
            found = score([item for item in judged if item.split == split])
            metrics[f"shapes_{split}"] = found["overall"]
            metrics |= {f"shapes_{split}_{skill}": share for skill, share in found["skills"].items()}
        return Evaluated(metrics, examples(judged))

    only = (lambda side: side == IMAGE_SIZE, f"whose pictures are of {IMAGE_SIZE} x {IMAGE_SIZE} pixels")
    return Benchmark([scene.caption for _, scene in scenes], verdict, summarise, sides=only)


def _mazes(settings: EvaluationConfig) -> Benchmark:
    """Mazes: a picture is right if every cell of it is."""
    from rmoe_megatron.evaluation.mazes.evaluate import read_set, score
    from rmoe_megatron.evaluation.mazes.judge import is_right

    description, grids = read_set(Path(settings.data or ""), settings.limit)
    canvas = len(grids[0].cells)

    def summarise(verdicts: Sequence[Any], images: Images) -> Evaluated:
        found = score(description, grids, verdicts)
        metrics = {"mazes_exact": found["exact"]}
        metrics |= {f"mazes_exact_{name}_steps": each["exact"] for name, each in found["by_steps"].items()}
        labels = [f"{grid.steps} steps, side {grid.side}" for grid in grids]
        return Evaluated(metrics, _examples(images, labels, [float(right) for right in verdicts]))

    return Benchmark(
        [grid.text for grid in grids],
        lambda models, number, image: is_right(image, grids[number].cells),
        summarise,
        sides=(lambda side: side % canvas == 0, f"whose pictures have {canvas} x {canvas} cells"),
    )


def _geneval(settings: EvaluationConfig) -> Benchmark:
    """GenEval by its official rules."""
    from rmoe_megatron.evaluation.geneval.evaluate import CLIP, DETECTOR, judge_image, load_judges
    from rmoe_megatron.evaluation.geneval.prompts import make_prompts, read_metadata

    everything = make_prompts() if settings.data is None else read_metadata(Path(settings.data))
    prompts = _part(everything, [each["tag"] for each in everything], settings.limit)
    detector, clip = settings.judges or (DETECTOR, CLIP)

    def verdict(models: Any, number: int, image: Images) -> list[Any]:
        found = judge_image(Image.fromarray(image), prompts[number], models, RuleSet.official)
        return [found["correct"], found["reason"]]

    def summarise(verdicts: Sequence[Any], images: Images) -> Evaluated:
        by_task: dict[str, list[bool]] = {}
        for prompt, (correct, _) in zip(prompts, verdicts, strict=True):
            by_task.setdefault(prompt["tag"], []).append(correct)
        tasks = {task: float(np.mean(right)) for task, right in by_task.items()}
        metrics = {"geneval_overall": float(np.mean(list(tasks.values())))}
        metrics |= {f"geneval_{task}": share for task, share in tasks.items()}
        labels = [
            f"{prompt['prompt']}: {reason.splitlines()[0] if reason else 'right'}"
            for prompt, (_, reason) in zip(prompts, verdicts, strict=True)
        ]
        return Evaluated(metrics, _examples(images, labels, [float(correct) for correct, _ in verdicts]))

    return Benchmark(
        [prompt["prompt"] for prompt in prompts],
        verdict,
        summarise,
        partial(load_judges, detector, clip),
        ((detector, judge_parts), (clip, judge_parts)),
    )


def _geneval2(settings: EvaluationConfig) -> Benchmark:
    """GenEval 2: Soft-TIFA by its official rules."""
    from rmoe_megatron.evaluation.geneval2.prompts import read_prompts
    from rmoe_megatron.evaluation.geneval2.soft_tifa import geometric_mean, score_atom
    from rmoe_megatron.evaluation.geneval2.soft_tifa import summarise as sum_up
    from rmoe_megatron.evaluation.question_answering import QWEN3_VL, Qwen3VL

    everything = read_prompts(Path(settings.data or ""))
    prompts = _part(everything, [each["atom_count"] for each in everything], settings.limit)
    (answerer,) = settings.judges or (QWEN3_VL,)

    def atoms(models: Any, number: int, image: Images) -> list[float]:
        picture = Image.fromarray(image)
        return [
            score_atom(models, picture, question, answer, RuleSet.official)
            for question, answer in prompts[number]["vqa_list"]
        ]

    def summarise(verdicts: Sequence[Any], images: Images) -> Evaluated:
        means = [geometric_mean(each) for each in verdicts]
        metrics = {
            "geneval2_soft_tifa_gm": 100 * float(np.mean(means)),
            "geneval2_soft_tifa_am": 100 * float(np.mean([np.mean(each) for each in verdicts])),
        }
        metrics |= {
            f"geneval2_{skill}": share for skill, share in sum_up(verdicts, prompts)["skills_am"].items()
        }
        return Evaluated(metrics, _examples(images, [each["prompt"] for each in prompts], means))

    captions = [prompt["prompt"] for prompt in prompts]
    return Benchmark(captions, atoms, summarise, partial(Qwen3VL, answerer), ((answerer, judge_parts),))


def _dpg(settings: EvaluationConfig) -> Benchmark:
    """DPG-Bench, asked of a Qwen3-VL."""
    from rmoe_megatron.evaluation.dpg.answering import load_answerer
    from rmoe_megatron.evaluation.dpg.questions import read_items
    from rmoe_megatron.evaluation.dpg.scoring import score
    from rmoe_megatron.evaluation.question_answering import QWEN3_VL

    # Of the official rules' quirks one leaves prompts out, which a part of the table would feel more.
    everything = read_items(Path(settings.data or ""), RuleSet.fixed)
    items = _part(everything, [None] * len(everything), settings.limit)
    (answerer,) = settings.judges or (QWEN3_VL,)

    def answers(models: Any, number: int, image: Images) -> dict[str, str]:
        picture = Image.fromarray(image)
        asked = items[number].propositions
        return {str(key): models.answer(picture, each.question) for key, each in asked.items()}

    def summarise(verdicts: Sequence[Any], images: Images) -> Evaluated:
        said = [[{int(key): answer for key, answer in each.items()}] for each in verdicts]
        found = score(items, said, RuleSet.fixed)
        alone = [
            score([item], [each], RuleSet.fixed)["overall"] for item, each in zip(items, said, strict=True)
        ]
        metrics = {"dpg_overall": found["overall"]}
        metrics |= {f"dpg_{name}": share for name, share in found["categories_l1"].items()}
        return Evaluated(metrics, _examples(images, [item.prompt for item in items], alone))

    captions, load = [item.prompt for item in items], partial(load_answerer, answerer, "cpu")
    return Benchmark(captions, answers, summarise, load, ((answerer, judge_parts),))


def _corebench(settings: EvaluationConfig) -> Benchmark:
    """T2I-CoReBench in this package's own wording of the judge's instructions."""
    from rmoe_megatron.evaluation.corebench.evaluate import image_scores
    from rmoe_megatron.evaluation.corebench.evaluate import summarise as sum_up
    from rmoe_megatron.evaluation.corebench.judging import JUDGES, ask, read_wording
    from rmoe_megatron.evaluation.corebench.prompts import read_prompts
    from rmoe_megatron.evaluation.question_answering import Qwen3VL

    everything = read_prompts(Path(settings.data or ""))
    prompts = _part(everything, [each.dimension for each in everything], settings.limit)
    answerer, wording = (settings.judges or JUDGES)[0], read_wording(None)

    def summarise(verdicts: Sequence[Any], images: Images) -> Evaluated:
        answers = {number: [of_image] for number, of_image in enumerate(verdicts)}
        scores = image_scores(answers, RuleSet.fixed)
        found = sum_up(scores, prompts, None)
        metrics = {f"corebench_{name}": found[name] for name in ("overall", "composition", "reasoning")}
        metrics |= {f"corebench_{name}": share for name, share in found["dimensions"].items()}
        known = {name: share for name, share in metrics.items() if share is not None}
        shares = [share or 0.0 for number in range(len(prompts)) for share in scores[number]]
        return Evaluated(known, _examples(images, [each.text for each in prompts], shares))

    return Benchmark(
        [prompt.text for prompt in prompts],
        lambda models, number, image: ask(models, Image.fromarray(image), prompts[number], wording, True),
        summarise,
        partial(Qwen3VL, answerer),
        ((answerer, judge_parts),),
    )


def _pickscore(settings: EvaluationConfig) -> Benchmark:
    """PickScore of the prompts of a text file."""
    from rmoe_megatron.evaluation.preference.evaluate import load_pickscore
    from rmoe_megatron.evaluation.preference.hpsv3 import base_parts
    from rmoe_megatron.evaluation.preference.pickscore import BASE, WEIGHTS

    lines = lines_of(read_text(Path(settings.data or ""), MAX_PROMPTS, follow=True))
    prompts = [line.strip() for line in lines if line.strip()][: settings.limit]
    if not prompts:
        raise UserError(f"{settings.data} holds no prompt; give a text file with one in a line.")
    weights, base = settings.judges or (WEIGHTS, BASE)

    def summarise(verdicts: Sequence[Any], images: Images) -> Evaluated:
        return Evaluated({"pickscore": float(np.mean(verdicts))}, _examples(images, prompts, verdicts))

    return Benchmark(
        prompts,
        lambda models, number, image: models.score(Image.fromarray(image), prompts[number]),
        summarise,
        partial(load_pickscore, weights, base),
        ((weights, judge_parts), (base, base_parts)),
    )


_BENCHMARKS: dict[str, Callable[[EvaluationConfig], Benchmark]] = {
    "shapes": _shapes, "mazes": _mazes, "geneval": _geneval, "geneval2": _geneval2, "dpg": _dpg, "corebench": _corebench,
    "pickscore": _pickscore,
}  # fmt: skip


def _part[T](everything: Sequence[T], tasks: Sequence[Any], limit: int) -> list[T]:
    chosen = take_in_turn(tasks, limit)
    return [everything[number] for number in (range(len(everything)) if chosen is None else chosen)]


def _examples(images: Images, captions: Sequence[str], scores: Sequence[float]) -> Image.Image:
    """Return the best pictures above the worst ones, with score and caption."""
    order = sorted(range(len(scores)), key=lambda number: -scores[number])
    chosen = {"best": order[:EXAMPLES], "worst": order[EXAMPLES:][-EXAMPLES:]}
    return stacked(
        {
            title: labelled_grid(
                images[numbers], [f"{scores[n]:.2f} {captions[n]}" for n in numbers], columns=6
            )
            for title, numbers in chosen.items()
            if numbers
        }
    )
