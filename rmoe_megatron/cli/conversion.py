"""The command line of conversions: ``rmoe convert to-hf / to-lora / to-single-file / from-hf / from-facebook-dit / push``. Thin: every command calls one function."""

from pathlib import Path
from typing import Annotated

import typer

from rmoe_megatron.cli.options import Bar, ParallelOverrides, require_model, require_run, told_to_all_ranks
from rmoe_megatron.config.model import Objective
from rmoe_megatron.distributed import launch
from rmoe_megatron.errors import UserError

convert_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Convert checkpoints from and to the formats of others.",
    epilog="Example: rmoe convert to-hf runs/shapes_tiny models/shapes_tiny",
)


RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Name the folder of a training run.")]
OutFolder = Annotated[Path, typer.Argument(help="Name the folder to create.")]
Step = Annotated[
    int | None, typer.Option(help="Export the checkpoint of this step. The default is the newest.")
]
Averaged = Annotated[
    bool, typer.Option("--ema/--raw", help="Export the averaged weights, or those of the step.")
]
ExportDtype = Annotated[
    str | None,
    typer.Option(help="Export in fp32, fp16 or bf16. The default is the checkpoint's data type."),
]
Base = Annotated[Path | None, typer.Option(help="Name the run of the frozen base, if it has moved.")]


@convert_app.command("to-hf", epilog="Example: rmoe convert to-hf runs/shapes_tiny models/shapes_tiny")
def to_hf(
    run_dir: RunFolder,
    out: OutFolder,
    step: Step = None,
    averaged: Averaged = True,
    dtype: ExportDtype = None,
    base: Base = None,
    remote_code: Annotated[
        bool,
        typer.Option("--remote-code", help="Put the code into the folder, for users without this package."),
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option(help="Split weights that are larger than this into several files.")
    ] = "5GB",
    transformer: Annotated[
        str,
        typer.Option(
            help="Choose whose class the transformer has. It is diffusers, rmoe, or auto for that of diffusers where it can express the model."
        ),
    ] = "auto",
    approximate: Annotated[
        bool,
        typer.Option(
            "--approximate", help="Accept the timestep features of diffusers in place of the original DiT's."
        ),
    ] = False,
) -> None:
    """Export a run to a diffusers folder."""
    launch.require_one_rank("rmoe convert to-hf")
    require_run(run_dir)
    asked = _parse_dtype(dtype)
    from rmoe_megatron.conversion.export import export_run

    progress = Bar("export", "tensor")
    errors = export_run(
        run_dir, out, step, averaged, asked, base, remote_code, max_shard_size,
        transformer, approximate, progress,
    )  # fmt: skip
    if errors:
        measured = ", ".join(f"{error:.2%} at t={timestep}" for timestep, error in errors.items())
        print(f"diffusers' timestep features change the output of these weights by {measured}")
    print(f"{out} can be loaded with diffusers and sampled with `rmoe sample {out}`")


@convert_app.command("to-lora", epilog="Example: rmoe convert to-lora runs/sd35_lora models/sd35_lora")
def to_lora(
    run_dir: RunFolder,
    out: OutFolder,
    step: Step = None,
    averaged: Averaged = True,
    dtype: ExportDtype = None,
    base: Base = None,
) -> None:
    """Export the LoRA of a run as a file of its own, which diffusers loads beside the base's weights."""
    launch.require_one_rank("rmoe convert to-lora")
    require_run(run_dir)
    asked = _parse_dtype(dtype)
    from rmoe_megatron.conversion.lora_file import export_lora

    path = export_lora(run_dir, out, step, averaged, asked, base)
    print(f"{path} can be loaded with `pipeline.load_lora_weights({str(out)!r})` (pip install peft)")


@convert_app.command(
    "to-single-file",
    epilog="Example: rmoe convert to-single-file runs/sd35_lora models/sd35_lora.safetensors --dtype bf16",
)
def to_single_file(
    run_dir: RunFolder,
    file: Annotated[Path, typer.Argument(help="Name the .safetensors file to create.")],
    step: Step = None,
    averaged: Averaged = True,
    dtype: ExportDtype = None,
    base: Base = None,
) -> None:
    """Export a model without recurrence as one file in the layout of SD3 or of the original DiT, as ComfyUI reads it."""
    launch.require_one_rank("rmoe convert to-single-file")
    require_run(run_dir)
    asked = _parse_dtype(dtype)
    from rmoe_megatron.conversion.single_file import export_single_file

    export_single_file(run_dir, file, step, averaged, asked, base, Bar("export", "tensor"))
    print(f"{file} holds the transformer; the text encoders and the autoencoder are those of the base")


@convert_app.command(
    "from-hf", epilog="Example: rmoe convert from-hf stabilityai/stable-diffusion-3.5-medium runs/sd35_medium"
)
def from_hf(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Name a diffusers folder of a pipeline or a transformer, a hub repository, or SD3's single file (.safetensors)."
        ),
    ],
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Name the run folder to create.")],
    text_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1 << 16,
            help="Give an MM-DiT so many text tokens, which are CLIP's 77 and those of T5. The default is what the folder says, or 333.",
            show_default=False,
        ),
    ] = None,
    overrides: ParallelOverrides = None,
) -> None:
    """Import SD3, SD3.5 or DiT weights. With torchrun and parallel.* settings each rank imports its part."""
    require_model(str(folder))
    from rmoe_megatron.conversion.importing import import_diffusers

    parallel = _parse_parallel(overrides)
    with told_to_all_ranks():
        import_diffusers(folder, run_dir, text_length, parallel, Bar("import", "tensor"))
    _say_imported(run_dir)


@convert_app.command(
    "from-facebook-dit", epilog="Example: rmoe convert from-facebook-dit DiT-XL-2-256x256.pt runs/dit_xl2"
)
def from_facebook_dit(
    file: Annotated[
        Path, typer.Argument(help="Name a checkpoint of the original DiT or of SiT (.pt or .safetensors).")
    ],
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Name the run folder to create.")],
    num_attention_heads: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="Say how many attention heads the model has, if its size is not one of the published.",
        ),
    ] = None,
    objective: Annotated[
        Objective | None,
        typer.Option(
            help="Take ddpm for a DiT and rectified_flow for a SiT. Their files hold the same tensors."
        ),
    ] = None,
    overrides: ParallelOverrides = None,
) -> None:
    """Import a DiT, or a SiT, in its original layout."""
    from rmoe_megatron.conversion.importing import import_facebook_dit

    parallel = _parse_parallel(overrides)
    with told_to_all_ranks():
        import_facebook_dit(file, run_dir, num_attention_heads, parallel, Bar("import", "tensor"), objective)
    _say_imported(run_dir)


@convert_app.command(
    "push", epilog="Example: rmoe convert push models/shapes_tiny owner/shapes_tiny --dry-run"
)
def push_command(
    folder: Annotated[Path, typer.Argument(help="Name a folder that to-hf or to-lora has made.")],
    repository: Annotated[str, typer.Argument(help="Name the repository of the hub, as OWNER/NAME.")],
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody see the repository. Without it, it is private.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files that would be sent, and send nothing.")
    ] = False,
) -> None:
    """Send an export to a repository of the Hugging Face hub, which is made if it is not there."""
    launch.require_one_rank("rmoe convert push")
    from rmoe_megatron.conversion.push import files_to_push, push

    files = files_to_push(folder, repository)
    for name, size in files:
        print(f"{size:>15,} bytes  {name}")
    total = f"{len(files)} files, {sum(size for _, size in files):,} bytes"
    if dry_run:
        visibility = "public" if public else "private"
        print(f"{total} would be sent to the {visibility} repository {repository}; nothing was sent")
        return
    print(f"{total}: {push(folder, repository, public)}")


def _say_imported(run_dir: Path) -> None:
    if launch.is_main_process():
        print(f"Imported; a run starts from these weights with fine_tuning.base={run_dir}")


def _parse_parallel(overrides: list[str] | None):  # type: ignore[no-untyped-def]  # a late import, as everywhere here
    """Return the parallel section that ``parallel.key=value`` settings make."""
    from rmoe_megatron.config.loading import load_parallel

    return load_parallel(overrides or [])


def _parse_dtype(name: str | None):  # type: ignore[no-untyped-def]  # a late import, as everywhere here
    """Return the data type of ``--dtype``, None where none is asked for.

    Raises:
        UserError: it is none.
    """
    if name not in (None, "fp32", "fp16", "bf16"):
        raise UserError(f"--dtype {name} must be fp32, fp16 or bf16.")
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.get(name or "")
