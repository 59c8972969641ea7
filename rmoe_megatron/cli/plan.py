"""The command line of plans: ``rmoe plan``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from rmoe_megatron.cli.options import Bar, Overrides
from rmoe_megatron.distributed import launch
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic


def plan_command(
    config: Annotated[Path, typer.Argument(help="Name the configuration of the run.")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, max=65536, help="Plan for so many accelerators.")] = 8,
    gpu: Annotated[
        str, typer.Option(help="Take this kind of accelerator: a100, h100, h200, b200 or mi300x.")
    ] = "h100",
    gpus_per_node: Annotated[
        int, typer.Option(min=1, max=128, help="Let so many accelerators share a node's links.")
    ] = 8,
    hardware: Annotated[
        Path | None, typer.Option(help="Take rates and shares from this JSON file in place of the table's.")
    ] = None,
    samples: Annotated[
        float | None,
        typer.Option(
            min=1,
            max=1e15,
            help="Count the cost of training on so many samples. The default is what the run's own steps take.",
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, max=1e6, help="Let one accelerator cost so much for an hour.")
    ] = None,
    imbalance: Annotated[
        float,
        typer.Option(
            min=1,
            max=4096,
            help="Give the experts of the planned rank so many times as many tokens as on average.",
        ),
    ] = 1.0,
    search: Annotated[
        bool, typer.Option("--search", help="Try every layout that fits the model, and plan the fastest one.")
    ] = False,
    write: Annotated[
        Path | None,
        typer.Option(help="With --search, write the fastest layout's configuration to this YAML file."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw memory and time into this PNG file.")] = None,
) -> None:
    """Say what a layout needs before any GPU is booked: memory of a rank, messages, time of a step.

    The run's own code takes a step on tensors without values, so that this works on a laptop for any number of GPUs. Memory and
    messages are counted; time is an estimate.
    """
    launch.require_one_rank("rmoe plan")
    from rmoe_megatron.config.loading import load_config, to_yaml
    from rmoe_megatron.config.validation import validate
    from rmoe_megatron.planning.hardware import find_hardware

    if write is not None and not search:
        raise UserError("--write goes with --search; add it.")
    if search and imbalance != 1:
        raise UserError("--imbalance is of one layout; leave out --search.")
    found = find_hardware(gpu, hardware)
    settings = load_config(config, overrides or [])
    if not search:
        validate(settings, gpus)
    # Importing Megatron-Core takes seconds.
    from rmoe_megatron.planning.costs import storage_of
    from rmoe_megatron.planning.plan import figures, make_plan
    from rmoe_megatron.planning.report import compare, describe, draw
    from rmoe_megatron.planning.search import search as search_layouts

    if search:
        best, estimates, misfits = search_layouts(
            settings, gpus, found, gpus_per_node, Bar("layouts", "layout")
        )
        typer.echo(compare(estimates, misfits) + "\n")
        if best is None:
            raise UserError(f"No layout fits {gpus} x {found.name}; take more GPUs, or larger ones.")
        plan = best
        if write is not None:
            atomic.write(write, to_yaml(plan.config))
    else:
        plan = make_plan(settings, gpus, found, gpus_per_node, imbalance)
    training = settings.training
    storage = storage_of(plan.config)
    typer.echo(describe(plan, storage, samples or training.steps * training.global_batch_size, price))
    if json_file is not None:
        atomic.write(json_file, json.dumps(figures(plan, storage), indent=1) + "\n")
    if picture is not None:
        with atomic.writing(picture) as partial:
            draw(plan, partial)
