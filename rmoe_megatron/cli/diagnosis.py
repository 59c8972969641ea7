"""The command line of diagnoses: ``rmoe diagnose precision / routing / nodes``. Thin: every command calls one function."""

import socket
from pathlib import Path
from typing import Annotated, cast

import typer

from rmoe_megatron.cli.options import (
    Bar,
    Depth,
    Dtype,
    Guidance,
    Overrides,
    Prompts,
    PromptsFile,
    Seed,
    Steps,
    check_guidance,
    read_prompts,
    require_run,
)
from rmoe_megatron.errors import RunError, UserError
from rmoe_megatron.files import atomic

diagnose_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look inside a trained model, or at the nodes of a job.",
    epilog="Example: rmoe diagnose precision runs/shapes_tiny",
)


@diagnose_app.command("precision", epilog="Example: rmoe diagnose precision runs/shapes_tiny")
def diagnose_precision(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Name the folder of a training run.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write precision.json and precision.png to this folder. The default is RUN/precision."
        ),
    ] = None,
    batches: Annotated[
        int,
        typer.Option(
            min=1,
            max=10_000,
            help="Average over so many micro-batches. 32 more come before, for the histories of delayed scaling.",
        ),
    ] = 4,
    overrides: Overrides = None,
) -> None:
    """Measure what each linear layer, and a recurrence's modules, would lose in FP8 and NVFP4, recipe by recipe, and draw it."""
    require_run(run_dir)
    from rmoe_megatron.inspection.precision import PRODUCTS, worst
    from rmoe_megatron.inspection.precision import diagnose_precision as diagnose
    from rmoe_megatron.inspection.watched_products import ALL_RECIPES

    out = out or run_dir / "precision"
    losses = diagnose(run_dir, out, batches, overrides or [], Bar("precision", "batch"))
    for recipe in ALL_RECIPES:
        print(f"{recipe}: the layers that lose most (relative errors)")
        for each in worst(losses, recipe, count=5):
            errors = "  ".join(f"{name.replace('_', ' ')} {getattr(each, name):.2%}" for name in PRODUCTS)
            print(f"  block {each.block:>3}  {each.layer:<34}{errors}")
    print(f"all of them: {out / 'precision.png'}")


@diagnose_app.command(
    "routing",
    epilog="Example: rmoe diagnose routing models/shapes_tiny --prompts-file configs/shapes_prompts.txt",
)
def diagnose_routing(
    model: Annotated[
        Path, typer.Argument(help="Name the folder of a training run or an exported diffusers folder.")
    ],
    prompt: Prompts = None,
    prompts_file: PromptsFile = None,
    out: Annotated[
        Path,
        typer.Option(help="Write index.html, routing.json and the pictures to this folder."),
    ] = Path("routing"),
    images_per_prompt: Annotated[
        int,
        typer.Option(min=1, max=64, help="Make so many images of every prompt, each with a seed of its own."),
    ] = 4,
    steps: Steps = 25,
    guidance: Guidance = 2.0,
    seed: Seed = 0,
    depth: Depth = None,
    dtype: Dtype = "auto",
) -> None:
    """Draw which module of a recurrence painted which patch, when and for which words, and how states and attention move."""
    check_guidance(guidance)
    prompts = read_prompts(prompt or [], prompts_file)
    if not model.is_dir():
        raise UserError(f"There is no folder {model}; give a training run's or an exported model's.")
    from rmoe_megatron.inference.sampling import resolve_dtype
    from rmoe_megatron.inspection.routing import RoutingSettings
    from rmoe_megatron.inspection.routing import diagnose_routing as diagnose

    settings = RoutingSettings(prompts, images_per_prompt, steps, guidance, seed, resolve_dtype(dtype), depth)
    for place in diagnose(model, out, settings, Bar("routing", "image")):
        shares = " ".join(f"{share:.2f}" for share in cast("list[float]", place["usage"]))
        print(
            f"block {place['block']}  pass {place['pass']}  latent step {place['latent_step']}  shares {shares}"
        )
    print(f"all of it: {out / 'index.html'}")


@diagnose_app.command(
    "nodes", epilog="Example: srun --ntasks-per-node=8 rmoe diagnose nodes /shared/check --gpus 8"
)
def diagnose_nodes(
    folder: Annotated[Path, typer.Argument(help="Name a folder on the file system that all nodes share.")],
    names: Annotated[
        str, typer.Option(help="Name the nodes, with blanks between them, in the order of their ranks.")
    ] = "",
    gpus: Annotated[int, typer.Option(min=0, max=1024, help="Expect so many GPUs of every node.")] = 0,
    min_bandwidth: Annotated[
        float,
        typer.Option(
            min=0, max=1e6, help="Expect so many GB/s of an all-reduce between nodes. 0 is no limit."
        ),
    ] = 0.0,
    min_free_disk: Annotated[
        float, typer.Option(min=0, max=1e9, help="Expect so many free GB on the disk of every node.")
    ] = 0.0,
    max_clock_skew: Annotated[
        float, typer.Option(min=0, max=1e9, help="Allow a clock to be so many seconds away from the others.")
    ] = 5.0,
    report: Annotated[
        Path | None,
        typer.Option(help="Write a line about every bad node, with its name and why, to this file."),
    ] = None,
) -> None:
    """Check GPUs, driver, bandwidth, disk, clock and shared file system of the nodes of a job. Start it by srun with a task for every GPU."""
    from rmoe_megatron.inspection.nodes import Limits, check_nodes

    limits = Limits(gpus, min_bandwidth, min_free_disk, max_clock_skew)
    found = check_nodes(folder, names.split() or [socket.gethostname()], limits)
    if found is None:
        return
    print("\n".join(found.lines), flush=True)
    if found.problems:
        lines = [f"{name} {'; '.join(problems)}" for name, problems in found.problems.items()]
        if report is not None:
            atomic.write(report, "".join(f"{line}\n" for line in lines))
        raise RunError(f"{len(lines)} of the nodes are not as they must be: {' | '.join(lines)}.")
