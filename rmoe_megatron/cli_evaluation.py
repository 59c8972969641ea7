"""``rmoe eval``: score models on benchmarks. Thin: every command calls one function."""

from pathlib import Path
from typing import Annotated

import typer

from rmoe_megatron import durable, launch
from rmoe_megatron.cli_options import (
    Bar,
    BatchSize,
    Dtype,
    Guidance,
    Seed,
    Steps,
    check_guidance,
    parse_numbers,
)
from rmoe_megatron.errors import UserError

eval_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Score models.")

Model = Annotated[
    str, typer.Argument(help="diffusers folder, or a folder of images in the benchmark's layout.")
]
Out = Annotated[
    Path, typer.Option(help="Folder for images, verdicts and results; what this command left there is kept.")
]
Again = Annotated[
    bool,
    typer.Option("--again", help="Make anew what another command left in OUT; without it that is refused."),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="So many prompts only, the tasks in turn; the score is not called overall."),
]
Interval = Annotated[tuple[float, float], typer.Option(help="Guide where timestep / 1000 lies in it.")]
Scheduler = Annotated[
    str | None,
    typer.Option(help="euler, ddim, dpm or a scheduler class of diffusers; default is the folder's."),
]
NegativePrompt = Annotated[str | None, typer.Option(help="What guidance leads away from.")]
AllowIncomplete = Annotated[
    bool,
    typer.Option(
        "--allow-incomplete",
        help="Score images that are not all as they should be; the result counts those that are not.",
    ),
]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the transformer.")]
ProtocolName = Annotated[str, typer.Option(help="official (bit-faithful, with its quirks) or fixed.")]


@eval_app.command("shapes")
def eval_shapes(
    model: Annotated[Path, typer.Argument(help="Exported diffusers folder.")],
    data: Annotated[Path, typer.Option(help="Folder made by `rmoe data build-shapes`.")],
    out: Annotated[Path, typer.Option(help="Folder for results.json and examples.png.")],
    images_per_prompt: Annotated[int, typer.Option(min=1, max=10_000, help="Each with its own seed.")] = 4,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts per split; default is all.")] = None,
    steps: Steps = 25,
    guidance: Guidance = 2.0,
    seed: Seed = 0,
    batch_size: BatchSize = 128,
    dtype: Dtype = "auto",
    again: Again = False,
) -> None:
    """Score a model on the toy shapes set by GenEval's rules."""
    import numpy as np

    from rmoe_megatron.data.store import LocalStore
    from rmoe_megatron.evaluation.shapes import evaluate_shapes

    launch.require_one_rank("rmoe eval shapes")
    check_guidance(guidance)
    durable.check_writable(out, "--out")
    LocalStore(data / "val").shards()  # a missing set is named before the model is loaded
    from rmoe_megatron.evaluation.generation import Sampling, sampling_record
    from rmoe_megatron.evaluation.provenance import require_results
    from rmoe_megatron.evaluation.shapes import set_record
    from rmoe_megatron.sampling import describe_place, open_pipeline, resolve_dtype, sample_images

    sampling = Sampling(str(model), steps, guidance, seed, batch_size, dtype=resolve_dtype(dtype))
    identity = {
        "benchmark": "toy shapes",
        "images_per_prompt": images_per_prompt,
        "prompt_set": set_record(data) | {"limit": limit},
        "sampling": sampling_record(sampling),
    }
    require_results(out / "results.json", identity, again)
    print(f"images are made {describe_place(sampling.dtype)}")
    pipeline = open_pipeline(model, sampling.dtype)

    def generate(prompts: list[str], seeds: list[int]) -> np.ndarray:
        return sample_images(pipeline, prompts, seeds, steps, guidance, batch_size)

    described = identity | {"model": str(model.absolute())}
    evaluate_shapes(
        generate, data, out, described, images_per_prompt, limit, seed, progress=Bar("eval shapes", "image")
    )


@eval_app.command("mazes")
def eval_mazes(
    model: Annotated[Path, typer.Argument(help="Exported diffusers folder.")],
    data: Annotated[Path, typer.Option(help="Folder made by `rmoe data build-mazes`.")],
    out: Annotated[Path, typer.Option(help="Folder for results.json and gallery.png.")],
    steps: Annotated[
        str, typer.Option(help="Numbers of sampling steps; the last of several changes next to nothing.")
    ] = "1,3,5",
    depths: Annotated[
        str | None,
        typer.Option(
            help="Loops or latent steps to try; default is what it was trained with.", show_default=False
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Grids; default is all.")] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 128,
    dtype: Dtype = "auto",
    again: Again = False,
) -> None:
    """Score a model on mazes: a picture is right if every cell of it is."""
    import numpy as np

    from rmoe_megatron.evaluation.mazes.evaluate import evaluate_mazes, read_set

    launch.require_one_rank("rmoe eval mazes")
    counts = parse_numbers("--steps", steps)
    tried = [None] if depths is None else list(parse_numbers("--depths", depths))
    if 0 in (*counts, *tried):
        raise UserError("--steps and --depths are 1 or more.")
    durable.check_writable(out, "--out")
    read_set(data, limit)  # a missing set is named before the model is loaded
    from rmoe_megatron.evaluation.generation import Sampling, sampling_record
    from rmoe_megatron.evaluation.mazes.evaluate import set_record
    from rmoe_megatron.evaluation.provenance import require_results
    from rmoe_megatron.sampling import describe_place, open_pipeline, resolve_dtype, sample_images, set_depth

    how = Sampling(str(model), counts[0], 1.0, seed, batch_size, dtype=resolve_dtype(dtype))
    identity = {
        "benchmark": "mazes",
        "prompt_set": set_record(data) | {"limit": limit},
        "sampling": sampling_record(how) | {"steps": list(counts), "depths": tried},
    }
    require_results(out / "results.json", identity, again)
    print(f"images are made {describe_place(how.dtype)}")
    pipeline = open_pipeline(model, how.dtype)

    def generate(texts: list[str], seeds: list[int], count: int, depth: int | None) -> np.ndarray:
        if depth is not None:
            set_depth(pipeline, depth)
        return sample_images(pipeline, texts, seeds, count, guidance=1.0, batch_size=batch_size)

    described = identity | {"model": str(model.absolute())}
    evaluate_mazes(
        generate, data, out, described, counts, tried, limit, seed, progress=Bar("eval mazes", "setting")
    )


@eval_app.command("geneval")
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
    from rmoe_megatron.evaluation.protocol import Protocol
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
        out, images_per_prompt, Protocol(_one_of(protocol)), detector, clip, again, chosen, allow_incomplete
    )
    evaluate_geneval(prompts, sampling, settings, _bars())


@eval_app.command("geneval2")
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
    from rmoe_megatron.evaluation.protocol import Protocol
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
    settings = Settings(out, Protocol(_one_of(protocol)), answerer, again, chosen, allow_incomplete)
    evaluate_geneval2(prompts, sampling, settings, _bars())


@eval_app.command("dpg")
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
    from rmoe_megatron.evaluation.protocol import Protocol
    from rmoe_megatron.sampling import resolve_dtype

    check_guidance(guidance, guidance_interval)
    durable.check_writable(out, "--out")
    if images_per_prompt not in (None, 1, 4):
        raise UserError(f"--images-per-prompt {images_per_prompt} must be 4 or 1.")
    rules = Protocol(_one_of(protocol))
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
    evaluate_dpg(items, sampling, settings, _bars())


@eval_app.command("imagenet")
def eval_imagenet(
    model: Annotated[
        str,
        typer.Argument(
            help="diffusers folder of a class-conditional model, a folder of PNG files, or an .npz."
        ),
    ],
    reference: Annotated[Path, typer.Option(help="ADM's VIRTUAL_imagenet256_labeled.npz.")],
    inception: Annotated[
        Path, typer.Option(help="torch-fidelity's weights-inception-2015-12-05-6726825d.pth.")
    ],
    out: Out,
    num_images: Annotated[
        int | None,
        typer.Option(
            min=8,
            max=10_000_000,
            help="Default is 50,000, and of images that are given all.",
            show_default=False,
        ),
    ] = None,
    sampling: Annotated[
        str,
        typer.Option(
            help="dit (DiT's and SiT's protocol: guidance on three channels, learned variance) or pipeline (the folder's)."
        ),
    ] = "dit",
    balanced: Annotated[
        bool | None,
        typer.Option(
            "--balanced/--random",
            help="Classes in turn, or drawn from the seed; default is as --sampling, which draws for dit.",
            show_default=False,
        ),
    ] = None,
    protocol: ProtocolName = "official",
    steps: Steps = 250,
    guidance: Guidance = 1.5,
    guidance_interval: Interval = (0.0, 1.0),
    scheduler: Scheduler = None,
    seed: Seed = 0,
    batch_size: BatchSize = 50,
    dtype: Dtype = "auto",
    compile: Compile = False,  # noqa: A002
    again: Again = False,
    allow_incomplete: AllowIncomplete = False,
) -> None:
    """ImageNet 256: FID, sFID, Inception score, precision, recall; with torchrun or srun all ranks share the work."""
    from rmoe_megatron.evaluation.generation import Sampling
    from rmoe_megatron.evaluation.imagenet.dit_sampling import Mode
    from rmoe_megatron.evaluation.imagenet.evaluate import Settings, evaluate_imagenet
    from rmoe_megatron.evaluation.protocol import Protocol
    from rmoe_megatron.sampling import resolve_dtype

    check_guidance(guidance, guidance_interval)
    durable.check_writable(out, "--out")
    if sampling not in ("dit", "pipeline"):
        raise UserError(f"--sampling {sampling} must be dit or pipeline.")
    how = Sampling(
        model,
        steps,
        guidance,
        seed,
        batch_size,
        guidance_interval,
        scheduler,
        None,
        resolve_dtype(dtype),
        compile,
    )
    settings = Settings(
        out,
        reference,
        inception,
        num_images,
        balanced=balanced,
        again=again,
        mode=Mode(sampling),
        protocol=Protocol(_one_of(protocol)),
        allow_incomplete=allow_incomplete,
    )
    evaluate_imagenet(how, settings, _bars())


@eval_app.command("compare")
def eval_compare(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of evaluations, or their results.json; the first is what the others are compared with."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for comparison.md, comparison.json and comparison.png.")],
) -> None:
    """Results side by side with published ones, and whether they differ by more than chance, prompt by prompt."""
    durable.check_writable(out, "--out")
    from rmoe_megatron.evaluation.comparison.compare import compare

    print(compare(results, out), end="")


def _one_of(protocol: str) -> str:
    if protocol not in ("official", "fixed"):
        raise UserError(f"--protocol {protocol} must be official or fixed.")
    return protocol


def _bars():  # type: ignore[no-untyped-def]  # a function of a title to a progress bar, shown by the first rank
    return lambda title: Bar(title, "image" if title == "sample" else "unit") if launch.speaks() else None
