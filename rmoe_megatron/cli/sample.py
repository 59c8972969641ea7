"""The command ``rmoe sample``. Thin: it calls one function."""

from pathlib import Path
from typing import Annotated

import typer

from rmoe_megatron.cli.options import (
    Bar,
    BatchSize,
    Depth,
    Dtype,
    Guidance,
    Prompts,
    PromptsFile,
    Seed,
    Steps,
    check_guidance,
    keeping,
    read_prompts,
    require_pipeline,
)
from rmoe_megatron.config.buckets import parse_bucket
from rmoe_megatron.distributed import launch
from rmoe_megatron.files import atomic


@keeping("the images that are finished")
def sample(
    model: Annotated[
        Path, typer.Argument(help="Name an exported diffusers folder, or a hub repository (owner/name).")
    ],
    prompt: Prompts = None,
    prompts_file: PromptsFile = None,
    out: Annotated[Path, typer.Option(help="Write the images and grid.png to this folder.")] = Path(
        "samples"
    ),
    steps: Steps = 25,
    guidance: Guidance = 2.0,
    guidance_interval: Annotated[
        tuple[float, float],
        typer.Option(help="Guide only where timestep / 1000 lies between these two numbers."),
    ] = (0.0, 1.0),
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="Sample with euler, ddim, dpm or a scheduler class of diffusers. The default is the folder's."
        ),
    ] = None,
    seed: Seed = 0,
    images_per_prompt: Annotated[
        int,
        typer.Option(
            min=1, max=10_000, help="Make so many images of every prompt, each with a seed of its own."
        ),
    ] = 1,
    size: Annotated[
        str | None,
        typer.Option(
            help="Make images of WIDTHxHEIGHT pixels. The default is the model's square.", show_default=False
        ),
    ] = None,
    depth: Depth = None,
    batch_size: BatchSize = 64,
    dtype: Dtype = "auto",
) -> None:
    """Make images from prompts; with torchrun or srun all ranks share the work."""
    check_guidance(guidance, guidance_interval)
    bucket = parse_bucket("--size", size) if size is not None else None
    prompts = read_prompts(prompt or [], prompts_file)
    require_pipeline(str(model))
    atomic.check_writable(out, "--out")
    from rmoe_megatron.inference.generation import Sampling
    from rmoe_megatron.inference.sample_folder import fill_folder
    from rmoe_megatron.inference.sampling import resolve_dtype

    sampling = Sampling(
        str(model), steps, guidance, seed, batch_size, guidance_interval, scheduler,
        dtype=resolve_dtype(dtype), size=bucket, depth=depth,
    )  # fmt: skip
    repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    others = fill_folder(
        out, repeated, sampling, Bar("sample", "image") if launch.is_main_process() else None
    )
    if not launch.is_main_process():
        return
    print(f"{len(repeated)} images and grid.png in {out}")
    if others:
        print(f"beside them {len(others)} of an earlier command: {others[0].name} to {others[-1].name}")
