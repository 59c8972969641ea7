"""``rmoe eval``: toys, ImageNet, comparisons, and the options of all its commands. Thin: every command calls one function."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    keeping,
    parse_numbers,
)
from rmoe_megatron.errors import UserError

if TYPE_CHECKING:
    from rmoe_megatron.evaluation.protocol import Protocol

KEEPING = keeping("the pictures and verdicts that are finished")

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
    with durable.filling(out):
        require_results(out / "results.json", identity, again)
        print(f"images are made {describe_place(sampling.dtype)}")
        pipeline = open_pipeline(model, sampling.dtype)

        def generate(prompts: list[str], seeds: list[int]) -> np.ndarray:
            return sample_images(pipeline, prompts, seeds, steps, guidance, batch_size)

        described = identity | {"model": str(model.absolute())}
        progress = Bar("eval shapes", "image")
        evaluate_shapes(generate, data, out, described, images_per_prompt, limit, seed, progress)


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
    with durable.filling(out):
        require_results(out / "results.json", identity, again)
        print(f"images are made {describe_place(how.dtype)}")
        pipeline = open_pipeline(model, how.dtype)

        def generate(texts: list[str], seeds: list[int], count: int, depth: int | None) -> np.ndarray:
            if depth is not None:
                set_depth(pipeline, depth)
            return sample_images(pipeline, texts, seeds, count, guidance=1.0, batch_size=batch_size)

        described = identity | {"model": str(model.absolute())}
        progress = Bar("eval mazes", "setting")
        evaluate_mazes(generate, data, out, described, counts, tried, limit, seed, progress)


@eval_app.command("imagenet")
@KEEPING
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
        protocol=protocol_of(protocol),
        allow_incomplete=allow_incomplete,
    )
    evaluate_imagenet(how, settings, bars())


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
    launch.require_one_rank("rmoe eval compare")
    durable.check_writable(out, "--out")
    from rmoe_megatron.evaluation.comparison.compare import compare

    print(compare(results, out), end="")


def protocol_of(name: str) -> "Protocol":
    """Return the rules of ``--protocol``.

    Raises:
        UserError: there are none of this name.
    """
    from rmoe_megatron.evaluation.protocol import Protocol

    if name not in ("official", "fixed"):
        raise UserError(f"--protocol {name} must be official or fixed.")
    return Protocol(name)


def bars() -> Callable[[str], Bar | None]:
    """Return what makes a progress bar with a title, which the first rank shows."""
    return lambda title: Bar(title, "image" if title == "sample" else "unit") if launch.speaks() else None
