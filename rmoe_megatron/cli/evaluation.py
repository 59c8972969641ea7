"""``rmoe eval``: toys, ImageNet, comparisons, and the options of all its commands. Thin: every command calls one function."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmoe_megatron.cli.options import (
    Bar,
    BatchSize,
    Dtype,
    Guidance,
    Seed,
    Steps,
    check_guidance,
    keeping,
    parse_numbers,
    require_model,
    require_pipeline,
)
from rmoe_megatron.distributed import launch
from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.early_checks import (
    IMAGENET_REFERENCE,
    INCEPTION,
    require_published,
    require_set,
)
from rmoe_megatron.files import atomic

if TYPE_CHECKING:
    from rmoe_megatron.evaluation.rule_set import RuleSet

KEEPING = keeping("the pictures and verdicts that are finished")

eval_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Score models on benchmarks.",
    epilog="Example: rmoe eval geneval models/t2i_2b --out scores/geneval",
)

Model = Annotated[
    str, typer.Argument(help="Name a diffusers folder, or a folder of images in the benchmark's layout.")
]
Out = Annotated[
    Path,
    typer.Option(
        help="Write images, verdicts and results to this folder. What the same command left there is kept."
    ),
]
Again = Annotated[
    bool,
    typer.Option(
        "--again", help="Make anew what another command left in OUT. Without this option that is refused."
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        min=1, help="Take so many prompts only, the tasks in turn. The score is then not called overall."
    ),
]
Interval = Annotated[
    tuple[float, float], typer.Option(help="Guide only where timestep / 1000 lies between these two numbers.")
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="Sample with euler, ddim, dpm or a scheduler class of diffusers. The default is the folder's."
    ),
]
NegativePrompt = Annotated[str | None, typer.Option(help="Let guidance lead away from this text.")]
AllowIncomplete = Annotated[
    bool,
    typer.Option(
        "--allow-incomplete",
        help="Score images that are not all as they should be. The result counts those that are not.",
    ),
]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the transformer with torch.compile.")]
ProtocolName = Annotated[
    str,
    typer.Option(
        help="Score by the published rules to the letter (official), or with their quirks repaired (fixed)."
    ),
]


@eval_app.command(
    "shapes", epilog="Example: rmoe eval shapes models/shapes_tiny --data data/shapes --out scores"
)
@KEEPING
def eval_shapes(
    model: Annotated[Path, typer.Argument(help="Name an exported diffusers folder.")],
    data: Annotated[Path, typer.Option(help="Name the folder that `rmoe data build-shapes` has made.")],
    out: Annotated[Path, typer.Option(help="Write results.json and examples.png to this folder.")],
    images_per_prompt: Annotated[
        int,
        typer.Option(
            min=1, max=10_000, help="Make so many images of every prompt, each with a seed of its own."
        ),
    ] = 4,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take so many prompts of every split. The default is all.")
    ] = None,
    steps: Steps = 25,
    guidance: Guidance = 2.0,
    seed: Seed = 0,
    batch_size: BatchSize = 128,
    dtype: Dtype = "auto",
    again: Again = False,
) -> None:
    """Score a model on the toy shapes set by GenEval's rules; with torchrun or srun all ranks share the work."""
    check_guidance(guidance)
    atomic.check_writable(out, "--out")
    require_set(data / "val", f"rmoe data build-shapes {data}")
    require_pipeline(str(model))
    from rmoe_megatron.evaluation.shapes import Settings, evaluate_shapes
    from rmoe_megatron.inference.generation import Sampling
    from rmoe_megatron.inference.sampling import resolve_dtype

    sampling = Sampling(str(model), steps, guidance, seed, batch_size, dtype=resolve_dtype(dtype))
    evaluate_shapes(sampling, Settings(data, out, images_per_prompt, limit, again), bars()("sample"))


@eval_app.command("mazes", epilog="Example: rmoe eval mazes models/mazes --data data/mazes --out scores")
@KEEPING
def eval_mazes(
    model: Annotated[Path, typer.Argument(help="Name an exported diffusers folder.")],
    data: Annotated[Path, typer.Option(help="Name the folder that `rmoe data build-mazes` has made.")],
    out: Annotated[Path, typer.Option(help="Write results.json and gallery.png to this folder.")],
    steps: Annotated[str, typer.Option(help="Try these numbers of sampling steps.")] = "1,3,5",
    depths: Annotated[
        str | None,
        typer.Option(
            help="Try these numbers of loops or latent steps. The default is what the model was trained with.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take so many grids. The default is all.")] = None,
    seed: Seed = 0,
    batch_size: BatchSize = 128,
    dtype: Dtype = "auto",
    again: Again = False,
) -> None:
    """Score a model on mazes: a picture is right if every cell of it is; with torchrun or srun all ranks share the work."""
    counts = parse_numbers("--steps", steps)
    tried = (None,) if depths is None else parse_numbers("--depths", depths)
    if 0 in (*counts, *tried):
        raise UserError("--steps and --depths are 1 or more.")
    atomic.check_writable(out, "--out")
    require_set(data / "test", f"rmoe data build-mazes {data}")
    require_pipeline(str(model))
    from rmoe_megatron.evaluation.mazes.evaluate import Settings, evaluate_mazes
    from rmoe_megatron.inference.generation import Sampling
    from rmoe_megatron.inference.sampling import resolve_dtype

    sampling = Sampling(str(model), counts[0], 1.0, seed, batch_size, dtype=resolve_dtype(dtype))
    evaluate_mazes(sampling, Settings(data, out, counts, tried, limit, again), bars()("sample"))


@eval_app.command(
    "imagenet",
    epilog="Example: rmoe eval imagenet models/dit --reference imagenet.npz --inception inception.pth --out scores",
)
@KEEPING
def eval_imagenet(
    model: Annotated[
        str,
        typer.Argument(
            help="Name a diffusers folder of a class-conditional model, a folder of PNG files, or an .npz."
        ),
    ],
    reference: Annotated[Path, typer.Option(help="Name ADM's VIRTUAL_imagenet256_labeled.npz.")],
    inception: Annotated[
        Path, typer.Option(help="Name torch-fidelity's weights-inception-2015-12-05-6726825d.pth.")
    ],
    out: Out,
    num_images: Annotated[
        int | None,
        typer.Option(
            min=8,
            max=10_000_000,
            help="Score so many images. The default is 50,000, and all where images are given.",
            show_default=False,
        ),
    ] = None,
    sampling: Annotated[
        str,
        typer.Option(
            help="Sample by the protocol of DiT and SiT (dit), with guidance on three channels and learned variance, or as the folder's pipeline does (pipeline)."
        ),
    ] = "dit",
    balanced: Annotated[
        bool | None,
        typer.Option(
            "--balanced/--random",
            help="Take the classes in turn, or draw them from the seed. The default follows --sampling, which draws them for dit.",
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
    """Score FID, sFID, Inception score, precision and recall on ImageNet at 256 pixels. With torchrun or srun all ranks share the work."""
    check_guidance(guidance, guidance_interval)
    atomic.check_writable(out, "--out")
    if Path(model).suffix != ".npz":
        require_model(model)
    require_published(reference, "--reference", IMAGENET_REFERENCE)
    require_published(inception, "--inception", INCEPTION)
    from rmoe_megatron.evaluation.imagenet.dit_sampling import Mode
    from rmoe_megatron.evaluation.imagenet.evaluate import Settings, evaluate_imagenet
    from rmoe_megatron.inference.generation import Sampling
    from rmoe_megatron.inference.sampling import resolve_dtype

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


@eval_app.command("compare", epilog="Example: rmoe eval compare scores/base scores/ours --out comparison")
def eval_compare(
    results: Annotated[
        list[Path],
        typer.Argument(
            help="Name folders of evaluations, or their results.json. The others are compared with the first."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Write comparison.md, comparison.json and comparison.png to this folder.")
    ],
) -> None:
    """Lay results side by side with published ones, and say whether they differ by more than chance, prompt by prompt."""
    launch.require_one_rank("rmoe eval compare")
    from rmoe_megatron.evaluation.early_checks import results_file

    for each in results:
        results_file(each)
    atomic.check_writable(out, "--out")
    from rmoe_megatron.evaluation.comparison.compare import compare

    print(compare(results, out), end="")


def protocol_of(name: str) -> "RuleSet":
    """Return the rules of ``--protocol``.

    Raises:
        UserError: there are none of this name.
    """
    from rmoe_megatron.evaluation.rule_set import RuleSet

    if name not in ("official", "fixed"):
        raise UserError(f"--protocol {name} must be official or fixed.")
    return RuleSet(name)


def bars() -> Callable[[str], Bar | None]:
    """Return what makes a progress bar with a title, which the first rank shows."""
    return lambda title: (
        Bar(title, "image" if title == "sample" else "unit") if launch.is_main_process() else None
    )
