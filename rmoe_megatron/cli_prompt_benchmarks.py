"""``rmoe eval``: the benchmarks of prompts that are published. Thin: every command calls one function."""

from pathlib import Path
from typing import Annotated

import typer

from rmoe_megatron import durable
from rmoe_megatron.cli_evaluation import (
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
from rmoe_megatron.cli_options import BatchSize, Dtype, Guidance, Seed, Steps, check_guidance
from rmoe_megatron.errors import UserError

__all__ = ["eval_app"]


@eval_app.command("geneval")
@KEEPING
def eval_geneval(
    model: Model,
    out: Out,
    metadata: Annotated[
        Path | None,
        typer.Option(
            help="GenEval's evaluation_metadata.jsonl; default is made by its recipe.", show_default=False
        ),
    ] = None,
    images_per_prompt: Annotated[int, typer.Option(min=1, max=10_000, help="Each with its own seed.")] = 4,
    protocol: ProtocolName = "official",
    detector: Annotated[
        str, typer.Option(help="Mask2Former for COCO's instances: folder or hub repository.")
    ] = "facebook/mask2former-swin-small-coco-instance",
    clip: Annotated[
        str, typer.Option(help="CLIP for colours: folder or hub repository.")
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
    """GenEval: objects, counts, colours, positions; with torchrun or srun all ranks share the work."""
    from rmoe_megatron.evaluation.generation import Sampling
    from rmoe_megatron.evaluation.geneval.evaluate import Settings, evaluate_geneval
    from rmoe_megatron.evaluation.geneval.prompts import make_prompts, read_metadata
    from rmoe_megatron.evaluation.limits import take_in_turn
    from rmoe_megatron.sampling import resolve_dtype

    check_guidance(guidance, guidance_interval)
    durable.check_writable(out, "--out")
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


@eval_app.command("geneval2")
@KEEPING
def eval_geneval2(
    model: Model,
    data: Annotated[Path, typer.Option(help="GenEval 2's geneval2_data.jsonl.")],
    out: Out,
    protocol: ProtocolName = "official",
    answerer: Annotated[
        str, typer.Option(help="Qwen3-VL that answers the questions: folder or hub repository.")
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
    """GenEval 2: Soft-TIFA by skill and atomicity; with torchrun or srun all ranks share the work."""
    from rmoe_megatron.evaluation.generation import Sampling
    from rmoe_megatron.evaluation.geneval2.evaluate import Settings, evaluate_geneval2
    from rmoe_megatron.evaluation.geneval2.prompts import read_prompts
    from rmoe_megatron.evaluation.limits import take_in_turn
    from rmoe_megatron.sampling import resolve_dtype

    check_guidance(guidance, guidance_interval)
    durable.check_writable(out, "--out")
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


@eval_app.command("dpg")
@KEEPING
def eval_dpg(
    model: Model,
    data: Annotated[Path, typer.Option(help="DPG-Bench's dpg_bench.csv.")],
    out: Out,
    images_per_prompt: Annotated[
        int | None,
        typer.Option(
            help="4, in a grid of two by two, or 1; default is 4, and of a folder what its pictures say.",
            show_default=False,
        ),
    ] = None,
    protocol: ProtocolName = "official",
    answerer: Annotated[
        str, typer.Option(help="mplug (through modelscope), or a Qwen3-VL: folder or hub repository.")
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
    """DPG-Bench: long prompts by proposition and category; with torchrun or srun all ranks share the work."""
    from rmoe_megatron.evaluation.dpg.evaluate import Settings, evaluate_dpg
    from rmoe_megatron.evaluation.dpg.questions import is_published, read_items
    from rmoe_megatron.evaluation.generation import Sampling
    from rmoe_megatron.evaluation.limits import take_in_turn
    from rmoe_megatron.sampling import resolve_dtype

    check_guidance(guidance, guidance_interval)
    durable.check_writable(out, "--out")
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


@eval_app.command("corebench")
@KEEPING
def eval_corebench(
    model: Model,
    data: Annotated[Path, typer.Option(help="Folder data of github.com/KlingTeam/T2I-CoReBench.")],
    out: Out,
    images_per_prompt: Annotated[int, typer.Option(min=1, max=10_000, help="Each with its own seed.")] = 4,
    protocol: ProtocolName = "official",
    answerer: Annotated[
        str, typer.Option(help="Qwen3-VL that answers the questions: folder or hub repository.")
    ] = "Qwen/Qwen3-VL-30B-A3B-Thinking",
    judge_prompt: Annotated[
        Path | None,
        typer.Option(
            help="Text file with the judge's instructions; default is a wording of our own, which no published score is of.",
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
    """T2I-CoReBench: composition and reasoning by question; with torchrun or srun all ranks share the work."""
    from rmoe_megatron.evaluation.corebench.evaluate import Settings, evaluate_corebench
    from rmoe_megatron.evaluation.corebench.judging import read_wording
    from rmoe_megatron.evaluation.corebench.prompts import read_prompts
    from rmoe_megatron.evaluation.generation import Sampling
    from rmoe_megatron.evaluation.limits import take_in_turn
    from rmoe_megatron.sampling import resolve_dtype

    check_guidance(guidance, guidance_interval)
    durable.check_writable(out, "--out")
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


@eval_app.command("preference")
@KEEPING
def eval_preference(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures, in any layout.")],
    out: Out,
    scorer: Annotated[str, typer.Option(help="pickscore or hpsv3.")] = "pickscore",
    captions: Annotated[
        Path | None,
        typer.Option(
            help="Lines of JSON with file_name and text; default is what every picture says it was made of.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub repository; default is the scorer's published one.", show_default=False
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub repository of its tokenizer and image processor; default is the published one.",
            show_default=False,
        ),
    ] = None,
    instruction: Annotated[
        Path | None, typer.Option(help="HPSv3's instruction, a text file.", show_default=False)
    ] = None,
    again: Again = False,
    allow_incomplete: AllowIncomplete = False,
) -> None:
    """PickScore or HPSv3 of any folder: what people would prefer; with torchrun or srun all ranks share the work."""
    durable.check_writable(out, "--out")
    from rmoe_megatron.evaluation.preference.evaluate import ScorerName, Settings, evaluate_preference
    from rmoe_megatron.evaluation.preference.hpsv3 import read_instruction

    if scorer not in [each.value for each in ScorerName]:
        raise UserError(f"--scorer {scorer} must be pickscore or hpsv3.")
    text = None if instruction is None else read_instruction(instruction)
    settings = Settings(
        folder, out, ScorerName(scorer), captions, weights, base, text, again, allow_incomplete
    )
    evaluate_preference(settings, bars())
