"""``rmoe eval``: the benchmarks of prompts that are published. Thin: every command calls one function."""

from pathlib import Path
from typing import Annotated

import typer

from rmoe_megatron.cli.evaluation import (
    KEEPING,
    Again,
    AllowIncomplete,
    Compile,
    Interval,
    Limit,
    Model,
    NegativePrompt,
    Out,
    ProtocolName,
    Scheduler,
    bars,
    eval_app,
    protocol_of,
)
from rmoe_megatron.cli.options import BatchSize, Dtype, Guidance, Seed, Steps, check_guidance, require_model
from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.early_checks import (
    COREBENCH,
    DPG_TABLE,
    GENEVAL2_PROMPTS,
    require_judge,
    require_mplug,
    require_published,
    require_repository,
    require_scorer,
)
from rmoe_megatron.files import atomic

__all__ = ["eval_app"]


@eval_app.command("geneval", epilog="Example: rmoe eval geneval models/t2i_2b --out scores/geneval")
@KEEPING
def eval_geneval(
    model: Model,
    out: Out,
    metadata: Annotated[
        Path | None,
        typer.Option(
            help="Read the prompts from GenEval's evaluation_metadata.jsonl. By default they are made by its recipe.",
            show_default=False,
        ),
    ] = None,
    images_per_prompt: Annotated[
        int,
        typer.Option(
            min=1, max=10_000, help="Make so many images of every prompt, each with a seed of its own."
        ),
    ] = 4,
    protocol: ProtocolName = "official",
    detector: Annotated[
        str,
        typer.Option(
            help="Detect objects with this Mask2Former for COCO's instances, a folder or a hub repository."
        ),
    ] = "facebook/mask2former-swin-small-coco-instance",
    clip: Annotated[
        str, typer.Option(help="Judge colours with this CLIP, a folder or a hub repository.")
    ] = "openai/clip-vit-large-patch14",
    limit: Limit = None,
    steps: Steps = 50,
    guidance: Guidance = 7.0,
    guidance_interval: Interval = (0.0, 1.0),
    scheduler: Scheduler = None,
    negative_prompt: NegativePrompt = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    compile: Compile = False,  # noqa: A002
    again: Again = False,
    allow_incomplete: AllowIncomplete = False,
) -> None:
    """Score objects, counts, colours and positions by GenEval. With torchrun or srun all ranks share the work."""
    check_guidance(guidance, guidance_interval)
    atomic.check_writable(out, "--out")
    require_model(model)
    require_judge(detector, "--detector")
    require_judge(clip, "--clip")
    from rmoe_megatron.evaluation.geneval.evaluate import Settings, evaluate_geneval
    from rmoe_megatron.evaluation.geneval.prompts import make_prompts, read_metadata
    from rmoe_megatron.evaluation.limits import take_in_turn
    from rmoe_megatron.inference.generation import Sampling
    from rmoe_megatron.inference.sampling import resolve_dtype

    prompts = make_prompts() if metadata is None else read_metadata(metadata)
    sampling = Sampling(
        model,
        steps,
        guidance,
        seed,
        batch_size,
        guidance_interval,
        scheduler,
        negative_prompt,
        resolve_dtype(dtype),
        compile,
    )
    chosen = take_in_turn([metadata["tag"] for metadata in prompts], limit)
    settings = Settings(
        out, images_per_prompt, protocol_of(protocol), detector, clip, again, chosen, allow_incomplete
    )
    evaluate_geneval(prompts, sampling, settings, bars())


@eval_app.command(
    "geneval2",
    epilog="Example: rmoe eval geneval2 models/t2i_2b --data geneval2_data.jsonl --out scores/geneval2",
)
@KEEPING
def eval_geneval2(
    model: Model,
    data: Annotated[Path, typer.Option(help="Name GenEval 2's geneval2_data.jsonl.")],
    out: Out,
    protocol: ProtocolName = "official",
    answerer: Annotated[
        str, typer.Option(help="Let this Qwen3-VL, a folder or a hub repository, answer the questions.")
    ] = "Qwen/Qwen3-VL-8B-Instruct",
    limit: Limit = None,
    steps: Steps = 50,
    guidance: Guidance = 7.0,
    guidance_interval: Interval = (0.0, 1.0),
    scheduler: Scheduler = None,
    negative_prompt: NegativePrompt = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    compile: Compile = False,  # noqa: A002
    again: Again = False,
    allow_incomplete: AllowIncomplete = False,
) -> None:
    """Score Soft-TIFA by skill and atomicity on GenEval 2. With torchrun or srun all ranks share the work."""
    check_guidance(guidance, guidance_interval)
    atomic.check_writable(out, "--out")
    require_model(model)
    require_published(data, "--data", GENEVAL2_PROMPTS)
    require_judge(answerer, "--answerer")
    from rmoe_megatron.evaluation.geneval2.evaluate import Settings, evaluate_geneval2
    from rmoe_megatron.evaluation.geneval2.prompts import read_prompts
    from rmoe_megatron.evaluation.limits import take_in_turn
    from rmoe_megatron.inference.generation import Sampling
    from rmoe_megatron.inference.sampling import resolve_dtype

    sampling = Sampling(
        model,
        steps,
        guidance,
        seed,
        batch_size,
        guidance_interval,
        scheduler,
        negative_prompt,
        resolve_dtype(dtype),
        compile,
    )
    prompts = read_prompts(data)
    chosen = take_in_turn([prompt["atom_count"] for prompt in prompts], limit)
    settings = Settings(out, protocol_of(protocol), answerer, again, chosen, allow_incomplete)
    evaluate_geneval2(prompts, sampling, settings, bars())


@eval_app.command("dpg", epilog="Example: rmoe eval dpg models/t2i_2b --data dpg_bench.csv --out scores/dpg")
@KEEPING
def eval_dpg(
    model: Model,
    data: Annotated[Path, typer.Option(help="Name DPG-Bench's dpg_bench.csv.")],
    out: Out,
    images_per_prompt: Annotated[
        int | None,
        typer.Option(
            help="Make 4 images of every prompt, in a grid of two by two, or 1. The default is 4, and for a folder of images what they say of themselves.",
            show_default=False,
        ),
    ] = None,
    protocol: ProtocolName = "official",
    answerer: Annotated[
        str,
        typer.Option(
            help="Let mplug (through modelscope), or a Qwen3-VL (a folder or a hub repository), answer the questions."
        ),
    ] = "mplug",
    limit: Limit = None,
    steps: Steps = 50,
    guidance: Guidance = 7.0,
    guidance_interval: Interval = (0.0, 1.0),
    scheduler: Scheduler = None,
    negative_prompt: NegativePrompt = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    compile: Compile = False,  # noqa: A002
    again: Again = False,
    allow_incomplete: AllowIncomplete = False,
) -> None:
    """Score long prompts by proposition and category on DPG-Bench. With torchrun or srun all ranks share the work."""
    check_guidance(guidance, guidance_interval)
    atomic.check_writable(out, "--out")
    require_model(model)
    require_published(data, "--data", DPG_TABLE)
    require_mplug() if answerer == "mplug" else require_judge(answerer, "--answerer")
    from rmoe_megatron.evaluation.dpg.evaluate import Settings, evaluate_dpg
    from rmoe_megatron.evaluation.dpg.questions import is_published, read_items
    from rmoe_megatron.evaluation.limits import take_in_turn
    from rmoe_megatron.inference.generation import Sampling
    from rmoe_megatron.inference.sampling import resolve_dtype

    if images_per_prompt not in (None, 1, 4):
        raise UserError(f"--images-per-prompt {images_per_prompt} must be 4 or 1.")
    rules = protocol_of(protocol)
    sampling = Sampling(
        model,
        steps,
        guidance,
        seed,
        batch_size,
        guidance_interval,
        scheduler,
        negative_prompt,
        resolve_dtype(dtype),
        compile,
    )
    items = read_items(data, rules)
    is_official = limit is None and is_published(data)
    chosen = take_in_turn([None] * len(items), limit)
    settings = Settings(out, images_per_prompt, rules, answerer, is_official, again, chosen, allow_incomplete)
    evaluate_dpg(items, sampling, settings, bars())


@eval_app.command(
    "corebench",
    epilog="Example: rmoe eval corebench models/t2i_2b --data T2I-CoReBench/data --out scores/corebench",
)
@KEEPING
def eval_corebench(
    model: Model,
    data: Annotated[Path, typer.Option(help="Name the folder data of github.com/KlingTeam/T2I-CoReBench.")],
    out: Out,
    images_per_prompt: Annotated[
        int,
        typer.Option(
            min=1, max=10_000, help="Make so many images of every prompt, each with a seed of its own."
        ),
    ] = 4,
    protocol: ProtocolName = "official",
    answerer: Annotated[
        str, typer.Option(help="Let this Qwen3-VL, a folder or a hub repository, answer the questions.")
    ] = "Qwen/Qwen3-VL-30B-A3B-Thinking",
    judge_prompt: Annotated[
        Path | None,
        typer.Option(
            help="Instruct the judge by this text file. The default is a wording of our own, which no published score is of.",
            show_default=False,
        ),
    ] = None,
    limit: Limit = None,
    steps: Steps = 50,
    guidance: Guidance = 7.0,
    guidance_interval: Interval = (0.0, 1.0),
    scheduler: Scheduler = None,
    negative_prompt: NegativePrompt = None,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    dtype: Dtype = "auto",
    compile: Compile = False,  # noqa: A002
    again: Again = False,
    allow_incomplete: AllowIncomplete = False,
) -> None:
    """Score composition and reasoning by question on T2I-CoReBench. With torchrun or srun all ranks share the work."""
    check_guidance(guidance, guidance_interval)
    atomic.check_writable(out, "--out")
    require_model(model)
    require_repository(data, "--data", COREBENCH)
    require_judge(answerer, "--answerer")
    from rmoe_megatron.evaluation.corebench.evaluate import Settings, evaluate_corebench
    from rmoe_megatron.evaluation.corebench.judging import read_wording
    from rmoe_megatron.evaluation.corebench.prompts import read_prompts
    from rmoe_megatron.evaluation.limits import take_in_turn
    from rmoe_megatron.inference.generation import Sampling
    from rmoe_megatron.inference.sampling import resolve_dtype

    rules = protocol_of(protocol)
    sampling = Sampling(
        model,
        steps,
        guidance,
        seed,
        batch_size,
        guidance_interval,
        scheduler,
        negative_prompt,
        resolve_dtype(dtype),
        compile,
    )
    prompts, wording = read_prompts(data), read_wording(judge_prompt)
    chosen = take_in_turn([prompt.dimension for prompt in prompts], limit)
    settings = Settings(out, images_per_prompt, rules, answerer, wording, again, chosen, allow_incomplete)
    evaluate_corebench(prompts, sampling, settings, bars())


@eval_app.command(
    "preference", epilog="Example: rmoe eval preference pictures --scorer pickscore --out scores/preference"
)
@KEEPING
def eval_preference(
    folder: Annotated[Path, typer.Argument(help="Name a folder of pictures, in any layout.")],
    out: Out,
    scorer: Annotated[str, typer.Option(help="Score with pickscore or with hpsv3.")] = "pickscore",
    captions: Annotated[
        Path | None,
        typer.Option(
            help="Read captions from lines of JSON with file_name and text. The default is what every picture says it was made of.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Take the scorer's weights from this folder or hub repository. The default is its published one.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Take its tokenizer and image processor from this folder or hub repository. The default is the published one.",
            show_default=False,
        ),
    ] = None,
    instruction: Annotated[
        Path | None, typer.Option(help="Instruct HPSv3 by this text file.", show_default=False)
    ] = None,
    again: Again = False,
    allow_incomplete: AllowIncomplete = False,
) -> None:
    """Score any folder by what people would prefer, with PickScore or HPSv3. With torchrun or srun all ranks share the work."""
    atomic.check_writable(out, "--out")
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; give one with pictures.")
    require_scorer(scorer, weights, base)
    from rmoe_megatron.evaluation.preference.evaluate import ScorerName, Settings, evaluate_preference
    from rmoe_megatron.evaluation.preference.hpsv3 import read_instruction

    text = None if instruction is None else read_instruction(instruction)
    settings = Settings(
        folder, out, ScorerName(scorer), captions, weights, base, text, again, allow_incomplete
    )
    evaluate_preference(settings, bars())
