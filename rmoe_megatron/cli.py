"""The command line: ``rmoe data / train / inspect / diagnose / convert / sample / eval``. Thin: every command calls one function."""

import logging
import os
import socket
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from rmoe_megatron import durable, launch, standard_streams, stop_signals
from rmoe_megatron.cli_data import data_app
from rmoe_megatron.cli_options import (
    Bar,
    BatchSize,
    Depth,
    Dtype,
    Guidance,
    Overrides,
    ParallelOverrides,
    Seed,
    Steps,
    check_guidance,
    keeping,
    read_prompts,
)
from rmoe_megatron.cli_prompt_benchmarks import eval_app
from rmoe_megatron.config.buckets import parse_bucket
from rmoe_megatron.config.model import Objective
from rmoe_megatron.disk_errors import message_of
from rmoe_megatron.errors import Interrupted, RunError, UserError, exit_code
from rmoe_megatron.extras import PACKAGE, extra_of

# Rich markup would swallow the [brackets] of the help texts.
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    help="Train, convert, sample and score diffusion transformers with recursive sparse mixture-of-experts.",
)
convert_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Convert checkpoints.")
app.add_typer(data_app, name="data")
app.add_typer(convert_app, name="convert")
app.add_typer(eval_app, name="eval")
diagnose_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look inside a trained model.")
app.add_typer(diagnose_app, name="diagnose")


def main() -> None:
    """Run the command line; its exit code is 2 for a user's mistake, 1 for a failed run, 75 for one that was interrupted.

    A disk that is full or broken is for the user to see to, too: 2. Each is one line on standard error.
    """
    standard_streams.open_closed()
    standard_streams.outlive_reader("stderr")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings(
        "ignore", category=SyntaxWarning, module=r".*[\\/]megatron[\\/]"
    )  # as it is compiled
    warnings.filterwarnings(
        "ignore", module=r"torch\.distributed"
    )  # calls of Megatron-Core's that it will rename
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # PyTorch warns of a missing GPU
    # So does DeepSpeed, which diffusers' accelerate imports wherever it is installed.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.msg)
    # transformers tells of image processors that diffusers imports and nobody here uses.
    logging.getLogger("transformers.utils.import_utils").addFilter(
        lambda record: "requires torchvision" not in record.getMessage()
    )
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app()
    except (UserError, RunError, OSError) as error:
        message = message_of(error)
        if message is None:  # a library's own, with a traceback
            raise
        _end(f"error: {message}", exit_code(error))
    except Interrupted as interruption:
        _end(f"interrupted: {interruption}", interruption.code)
    except ModuleNotFoundError as error:
        found = extra_of(error.name or "")
        if found is None:
            raise
        extra, distribution = found
        _end(
            f"error: `{_command_called()}` needs the {extra} extra ({distribution} is not installed); "
            f"run `pip install '{PACKAGE}[{extra}]'`.",
            2,
        )


def _end(message: str, code: int) -> NoReturn:
    Bar.end_lines()
    if launch.speaks():
        print(message, file=sys.stderr)
    sys.exit(code)


def _command_called() -> str:
    """Return the command as it was typed, without its arguments: ``rmoe convert to-hf``."""
    command, words = typer.main.get_command(app), ["rmoe"]
    for word in sys.argv[1:]:
        commands = getattr(command, "commands", {})
        if word in commands:
            command = commands[word]
            words.append(word)
    return " ".join(words)


@app.command()
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...", help="Configuration and settings; with --resume settings only."
        ),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.")] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Check the run and print its configuration; train nothing, need no GPU."
        ),
    ] = False,
    ranks: Annotated[
        int | None, typer.Option(min=1, max=launch.MAX_RANKS, help="With --check: of the job to come.")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Say which kernels the run uses, and why not others.")
    ] = False,
) -> None:
    """Train a model from a configuration, or go on with a run."""
    arguments = arguments or []
    if ranks is not None and not check:
        raise UserError("--ranks is for --check; torchrun or srun start the ranks of a run.")
    if check:
        _check_training(arguments, resume, ranks or launch.world_size())
        return
    stop_signals.listen()
    if verbose:
        logging.getLogger("rmoe_megatron").setLevel(logging.INFO)
    from rmoe_megatron.config.loading import load_config

    if resume is None and not arguments:
        raise UserError("train needs a configuration file, or --resume RUN; see `rmoe train --help`.")
    standard_streams.outlive_reader("stdout")
    with _told_to_all_ranks():
        if resume is not None:
            from rmoe_megatron.training.run_lock import check_files

            check_files(resume)  # importing Megatron-Core takes seconds
            from rmoe_megatron.training import run

            run.resume(resume, arguments)
            return
        from rmoe_megatron.training import preflight

        config = load_config(Path(arguments[0]), arguments[1:])
        preflight.check(config, launch.world_size())  # as the run does: importing Megatron-Core takes seconds
        from rmoe_megatron.training import run

        run.train(config)


def _told_to_all_ranks() -> AbstractContextManager[None]:
    """Return the context of what ranks do together: what ends one before they have met is told to those who wait for it."""
    if launch.world_size() == 1:
        return nullcontext()
    from rmoe_megatron.rank_watch import telling_all_ranks

    return telling_all_ranks()


def _check_training(arguments: list[str], resume: Path | None, ranks: int) -> None:
    """Check a run of ``ranks`` ranks, new or resumed, and print its configuration and layout."""
    from rmoe_megatron.checkpoint.folders import list_checkpoints
    from rmoe_megatron.config.layout_checks import data_parallel_size
    from rmoe_megatron.config.loading import load_config, to_yaml
    from rmoe_megatron.training import preflight

    if resume is not None:
        config = load_config(resume / "config.yaml", [*arguments, f"run_dir={resume}"])
    elif arguments:
        config = load_config(Path(arguments[0]), arguments[1:])
        if list_checkpoints(Path(config.run_dir)):
            raise UserError(
                f"{config.run_dir} already holds checkpoints; continue it with --resume {config.run_dir} or choose another "
                "run_dir."
            )
    else:
        raise UserError("train --check needs a configuration file, or --resume RUN.")
    preflight.check_submission(config, ranks)
    layout = config.parallel
    print(to_yaml(config), end="")
    print(
        f"# {ranks} ranks = data {data_parallel_size(layout, ranks)} x tensor {layout.tensor_model_parallel_size} "
        f"x context {layout.context_parallel_size} x pipeline {layout.pipeline_model_parallel_size};"
    )
    print(f"# experts spread over {layout.expert_model_parallel_size} ranks of a pipeline stage")
    print(f"# a checkpoint takes {preflight.checkpoint_bytes(config) / 1e9:.4g} GB")
    print(f"# run folder: {Path(config.run_dir).absolute()}")


@app.command()
def inspect(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Don't compare checkpoints with their checksums.")
    ] = False,
) -> None:
    """List a run's checkpoints, verified, and when it was started, interrupted and resumed."""
    launch.require_one_rank("rmoe inspect")
    from rmoe_megatron.show_run import show_run

    for line in show_run(run_dir, quick):
        print(line, flush=True)


@diagnose_app.command("precision")
def diagnose_precision(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for precision.json and precision.png; RUN/precision if not given."),
    ] = None,
    batches: Annotated[
        int,
        typer.Option(
            min=1,
            max=10_000,
            help="Micro-batches to average over; 32 more come before, for the histories of delayed scaling.",
        ),
    ] = 4,
    overrides: Overrides = None,
) -> None:
    """Measure what each linear layer, and a recurrence's modules, would lose in FP8 and NVFP4, recipe by recipe, and draw it."""
    from rmoe_megatron.diagnostics.precision import PRODUCTS, worst
    from rmoe_megatron.diagnostics.precision import diagnose_precision as diagnose
    from rmoe_megatron.diagnostics.watched_products import ALL_RECIPES

    out = out or run_dir / "precision"
    losses = diagnose(run_dir, out, batches, overrides or [], Bar("precision", "batch"))
    for recipe in ALL_RECIPES:
        print(f"{recipe}: the layers that lose most (relative errors)")
        for each in worst(losses, recipe, count=5):
            errors = "  ".join(f"{name.replace('_', ' ')} {getattr(each, name):.2%}" for name in PRODUCTS)
            print(f"  block {each.block:>3}  {each.layer:<34}{errors}")
    print(f"all of them: {out / 'precision.png'}")


@diagnose_app.command("nodes")
def diagnose_nodes(
    folder: Annotated[Path, typer.Argument(help="On the file system that all nodes share.")],
    names: Annotated[str, typer.Option(help="Names of the nodes in the order of their ranks.")] = "",
    gpus: Annotated[int, typer.Option(min=0, max=1024, help="That a node must have.")] = 0,
    min_bandwidth: Annotated[
        float, typer.Option(min=0, max=1e6, help="GB/s of an all-reduce between nodes; 0 is no limit.")
    ] = 0.0,
    min_free_disk: Annotated[float, typer.Option(min=0, max=1e9, help="GB of every node.")] = 0.0,
    max_clock_skew: Annotated[float, typer.Option(min=0, max=1e9, help="Seconds from the others'.")] = 5.0,
    report: Annotated[
        Path | None, typer.Option(help="File for a line about every bad node: its name and why.")
    ] = None,
) -> None:
    """Check the nodes of a job: GPUs, driver, bandwidth, disk, clock, shared file system; with srun a task for every GPU."""
    from rmoe_megatron.diagnostics.nodes import Limits, check_nodes

    limits = Limits(gpus, min_bandwidth, min_free_disk, max_clock_skew)
    found = check_nodes(folder, names.split() or [socket.gethostname()], limits)
    if found is None:
        return
    print("\n".join(found.lines), flush=True)
    if found.problems:
        lines = [f"{name} {'; '.join(problems)}" for name, problems in found.problems.items()]
        if report is not None:
            durable.write(report, "".join(f"{line}\n" for line in lines))
        raise RunError(f"{len(lines)} of the nodes are not as they must be: {' | '.join(lines)}.")


@convert_app.command("to-hf")
def to_hf(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run.")],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint to export; default is the newest.")] = None,
    averaged: Annotated[
        bool, typer.Option("--ema/--raw", help="Averaged weights or those of the step.")
    ] = True,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, fp16 or bf16; default is the checkpoint's.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Run of the frozen base, if it has moved.")] = None,
    remote_code: Annotated[
        bool, typer.Option("--remote-code", help="Carry the code for users without this package.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Weights above it are split.")] = "5GB",
    transformer: Annotated[
        str,
        typer.Option(
            help="Whose class: diffusers, rmoe, or auto for diffusers' where it can express the model."
        ),
    ] = "auto",
    approximate: Annotated[
        bool,
        typer.Option("--approximate", help="Take diffusers' timestep features for the original DiT's."),
    ] = False,
) -> None:
    """Export a run to a diffusers folder."""
    launch.require_one_rank("rmoe convert to-hf")
    import torch

    from rmoe_megatron.conversion.export import export_run

    dtypes = {None: None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if dtype not in dtypes:
        raise UserError(f"--dtype {dtype} must be fp32, fp16 or bf16.")
    progress = Bar("export", "tensor")
    errors = export_run(
        run_dir, out, step, averaged, dtypes[dtype], base, remote_code, max_shard_size,
        transformer, approximate, progress,
    )  # fmt: skip
    if errors:
        measured = ", ".join(f"{error:.2%} at t={timestep}" for timestep, error in errors.items())
        print(f"diffusers' timestep features change the output of these weights by {measured}")
    print(f"{out} can be loaded with diffusers and sampled with `rmoe sample {out}`")


@convert_app.command("from-hf")
def from_hf(
    folder: Annotated[
        Path,
        typer.Argument(
            help="diffusers folder: a pipeline's or a transformer's; a hub repository; or SD3's single file (.safetensors)."
        ),
    ],
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder to create.")],
    text_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1 << 16,
            help="Text tokens of an MM-DiT: CLIP's 77 and T5's; default is what the folder says, or 333.",
            show_default=False,
        ),
    ] = None,
    overrides: ParallelOverrides = None,
) -> None:
    """Import SD3, SD3.5 or DiT weights; with torchrun and parallel.* settings each rank imports its part."""
    from rmoe_megatron.conversion.importing import import_diffusers

    parallel = _parse_parallel(overrides)
    with _told_to_all_ranks():
        import_diffusers(folder, run_dir, text_length, parallel, Bar("import", "tensor"))
    _say_imported(run_dir)


@convert_app.command("from-facebook-dit")
def from_facebook_dit(
    file: Annotated[
        Path, typer.Argument(help="Checkpoint of the original DiT or of SiT (.pt or .safetensors).")
    ],
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder to create.")],
    num_attention_heads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="If the size is not one of the published.")
    ] = None,
    objective: Annotated[
        Objective | None,
        typer.Option(help="ddpm for a DiT, rectified_flow for SiT, whose files hold the same tensors."),
    ] = None,
    overrides: ParallelOverrides = None,
) -> None:
    """Import a DiT, or a SiT, in its original layout."""
    from rmoe_megatron.conversion.importing import import_facebook_dit

    parallel = _parse_parallel(overrides)
    with _told_to_all_ranks():
        import_facebook_dit(file, run_dir, num_attention_heads, parallel, Bar("import", "tensor"), objective)
    _say_imported(run_dir)


def _say_imported(run_dir: Path) -> None:
    if launch.speaks():
        print(f"Imported; a run starts from these weights with fine_tuning.base={run_dir}")


def _parse_parallel(overrides: list[str] | None):  # type: ignore[no-untyped-def]  # a late import, as everywhere here
    """Return the parallel section that ``parallel.key=value`` settings make."""
    from rmoe_megatron.config.loading import load_parallel

    return load_parallel(overrides or [])


@app.command()
@keeping("the images that are finished")
def sample(
    model: Annotated[
        Path, typer.Argument(help="Exported diffusers folder, or a hub repository (owner/name).")
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt, or a DiT's class label; can be given several times.")
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="Text file with one prompt a line.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the images and grid.png.")] = Path("samples"),
    steps: Steps = 25,
    guidance: Guidance = 2.0,
    guidance_interval: Annotated[
        tuple[float, float], typer.Option(help="Guide where timestep / 1000 lies in it.")
    ] = (0.0, 1.0),
    scheduler: Annotated[
        str | None,
        typer.Option(help="euler, ddim, dpm or a scheduler class of diffusers; default is the folder's."),
    ] = None,
    seed: Seed = 0,
    images_per_prompt: Annotated[int, typer.Option(min=1, max=10_000, help="Each with its own seed.")] = 1,
    size: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT in pixels; default is the model's square.", show_default=False),
    ] = None,
    depth: Depth = None,
    batch_size: BatchSize = 64,
    dtype: Dtype = "auto",
) -> None:
    """Make images from prompts."""
    launch.require_one_rank("rmoe sample")
    check_guidance(guidance, guidance_interval)
    bucket = parse_bucket("--size", size) if size is not None else None
    prompts = read_prompts(prompt or [], prompts_file)
    durable.check_writable(out, "--out")
    from rmoe_megatron.evaluation.generation import Sampling
    from rmoe_megatron.sample_folder import fill_folder
    from rmoe_megatron.sampling import resolve_dtype

    dtype = resolve_dtype(dtype)
    how = Sampling(str(model), steps, guidance, seed, batch_size, guidance_interval, scheduler, None, dtype)
    repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    others = fill_folder(out, repeated, how, bucket, depth, Bar("sample", "image"))
    print(f"{len(repeated)} images and grid.png in {out}")
    if others:
        print(f"beside them {len(others)} of an earlier command: {others[0].name} to {others[-1].name}")
