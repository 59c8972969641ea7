"""The command line: ``rmoe data / train / inspect / diagnose / convert / sample / eval``. Thin: every command calls one function."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from rmoe_megatron.cli import standard_streams
from rmoe_megatron.cli.conversion import convert_app
from rmoe_megatron.cli.data import data_app
from rmoe_megatron.cli.diagnosis import diagnose_app
from rmoe_megatron.cli.options import (
    Bar,
    BatchSize,
    Depth,
    Dtype,
    Guidance,
    Seed,
    Steps,
    check_guidance,
    keeping,
    read_prompts,
    require_pipeline,
    require_run,
    told_to_all_ranks,
)
from rmoe_megatron.cli.plan import plan_command
from rmoe_megatron.cli.prompt_benchmarks import eval_app
from rmoe_megatron.config.buckets import parse_bucket
from rmoe_megatron.distributed import launch, stop_signals
from rmoe_megatron.errors import Interrupted, RunError, UserError, exit_code
from rmoe_megatron.files import atomic
from rmoe_megatron.files.disk_errors import message_of
from rmoe_megatron.versions import versions_of

# Rich markup would swallow the [brackets] of the help texts.
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        (name, version), *_ = versions_of().items()
        print(f"{name} {version}")
        raise typer.Exit


app.add_typer(data_app, name="data")
app.add_typer(convert_app, name="convert")
app.add_typer(eval_app, name="eval")
app.add_typer(diagnose_app, name="diagnose")
app.command(
    "plan",
    epilog="Example: rmoe plan configs/t2i_2b.yaml --gpus 64 --gpu h100 parallel.tensor_model_parallel_size=2",
)(plan_command)


@app.callback(epilog="Example: rmoe train configs/shapes_tiny.yaml")
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end."),
    ] = False,
) -> None:
    """Train, convert, sample and score diffusion transformers with recursive sparse mixture-of-experts."""


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
        from rmoe_megatron.cli.missing_extra import (  # reading requirements takes a tenth of `rmoe --help`
            PACKAGE,
            extra_of,
        )

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


@app.command(epilog="Example: rmoe train configs/shapes_tiny.yaml optimizer.learning_rate=1e-3")
def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="Name a configuration, and settings that override it. With --resume give settings only.",
        ),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.")] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Check the run and print its configuration. Nothing is trained, and no GPU is needed.",
        ),
    ] = False,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, max=launch.MAX_RANKS, help="With --check, say how many ranks the job will have."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="With --check, count memory against that of this accelerator: a100, h100, h200, b200 or mi300x. The default is the GPU of this machine, if it has one.",
            show_default=False,
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Say which kernels the run uses, and why not others.")
    ] = False,
) -> None:
    """Train a model from a configuration, or go on with a run."""
    arguments = arguments or []
    if ranks is not None and not check:
        raise UserError("--ranks is for --check; torchrun or srun start the ranks of a run.")
    if gpu is not None and not check:
        raise UserError("--gpu is for --check; a run takes the GPUs that it finds.")
    if check:
        _check_training(arguments, resume, ranks or launch.world_size(), gpu)
        return
    stop_signals.listen()
    if verbose:
        logging.getLogger("rmoe_megatron").setLevel(logging.INFO)
    if resume is None and not arguments:
        raise UserError("train needs a configuration file, or --resume RUN; see `rmoe train --help`.")
    standard_streams.outlive_reader("stdout")
    with told_to_all_ranks():
        if resume is not None:
            from rmoe_megatron.training.run_lock import check_files

            require_run(resume)
            check_files(resume)  # importing Megatron-Core takes seconds
            from rmoe_megatron.training import run

            run.resume(resume, arguments)
            return
        from rmoe_megatron.config.loading import load_config
        from rmoe_megatron.config.validation import validate

        config = load_config(Path(arguments[0]), arguments[1:])
        validate(config, launch.world_size())
        from rmoe_megatron.training import preflight

        preflight.check(config, launch.world_size())  # as the run does: importing Megatron-Core takes seconds
        from rmoe_megatron.training import run

        run.train(config)


def _check_training(arguments: list[str], resume: Path | None, ranks: int, gpu: str | None) -> None:
    """Check a run of ``ranks`` ranks, new or resumed, and print its configuration, its layout and its memory on a GPU, if one is known."""
    from rmoe_megatron.checkpoint.folders import list_checkpoints
    from rmoe_megatron.checkpoint.size import checkpoint_bytes
    from rmoe_megatron.config.layout_checks import data_parallel_size
    from rmoe_megatron.config.loading import load_config, to_yaml
    from rmoe_megatron.distributed.device import runs_on_cuda
    from rmoe_megatron.planning.hardware import find_hardware
    from rmoe_megatron.training import preflight
    from rmoe_megatron.training.resuming import read_resumed

    hardware = find_hardware(gpu) if gpu is not None else None
    if resume is not None and list_checkpoints(resume):
        config, _ = read_resumed(resume, arguments)
    elif resume is not None:
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
    memory = "memory is not counted: this machine has no GPU, so name that of the run with --gpu"
    if hardware is not None or runs_on_cuda(config.device):  # importing Megatron-Core takes seconds
        from rmoe_megatron.planning.fit import check_fit, hardware_here

        if (found := hardware or hardware_here(config.device)) is not None:
            memory = check_fit(config, ranks, found, Bar("layouts", "layout"))
    layout = config.parallel
    print(to_yaml(config), end="")
    print(
        f"# {ranks} ranks = data {data_parallel_size(layout, ranks)} x tensor {layout.tensor_model_parallel_size} "
        f"x context {layout.context_parallel_size} x pipeline {layout.pipeline_model_parallel_size};"
    )
    print(f"# experts spread over {layout.expert_model_parallel_size} ranks of a pipeline stage")
    print(f"# {memory}")
    print(f"# a checkpoint takes {checkpoint_bytes(config) / 1e9:.4g} GB")
    print(f"# run folder: {Path(config.run_dir).absolute()}")


@app.command(epilog="Example: rmoe inspect runs/shapes_tiny")
def inspect(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Name the folder of a training run.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Don't compare checkpoints with their checksums.")
    ] = False,
) -> None:
    """Verify and list a run's checkpoints, and say when it was started, interrupted and resumed."""
    launch.require_one_rank("rmoe inspect")
    require_run(run_dir)
    from rmoe_megatron.inspection.run import show_run

    for line in show_run(run_dir, quick):
        print(line, flush=True)


@app.command(epilog="Example: rmoe sample models/shapes_tiny --prompt 'two red circles' --out samples")
@keeping("the images that are finished")
def sample(
    model: Annotated[
        Path, typer.Argument(help="Name an exported diffusers folder, or a hub repository (owner/name).")
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Draw this prompt, or this class label of a DiT. The option can be given several times."
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Draw the prompts of this text file, one a line.")
    ] = None,
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
    others = fill_folder(out, repeated, sampling, Bar("sample", "image") if launch.speaks() else None)
    if not launch.speaks():
        return
    print(f"{len(repeated)} images and grid.png in {out}")
    if others:
        print(f"beside them {len(others)} of an earlier command: {others[0].name} to {others[-1].name}")
