"""The commands ``rmoe train`` and ``rmoe inspect``. Thin: each calls one function."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from rmoe_megatron.cli import standard_streams
from rmoe_megatron.cli.options import Bar, require_run, told_to_all_ranks
from rmoe_megatron.distributed import launch, stop_signals
from rmoe_megatron.errors import UserError


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
        from rmoe_megatron.input_pipeline.shard_folders import check_local_shards

        config = load_config(Path(arguments[0]), arguments[1:])
        validate(config, launch.world_size())
        check_local_shards(config)
        from rmoe_megatron.training import preflight  # importing PyTorch takes seconds

        preflight.check(config, launch.world_size())  # as the run does: importing Megatron-Core takes seconds
        from rmoe_megatron.training import run

        run.train(config)


def _check_training(arguments: list[str], resume: Path | None, ranks: int, gpu: str | None) -> None:
    """Check a run of ``ranks`` ranks, new or resumed, and print its configuration, its layout and its memory on a GPU, if one is known."""
    from rmoe_megatron.config.layout_checks import data_parallel_size
    from rmoe_megatron.config.loading import load_config, to_yaml
    from rmoe_megatron.config.validation import validate
    from rmoe_megatron.input_pipeline.shard_folders import check_local_shards
    from rmoe_megatron.planning.hardware import find_hardware

    if resume is None and not arguments:
        raise UserError("train --check needs a configuration file, or --resume RUN.")
    hardware = find_hardware(gpu) if gpu is not None else None
    if resume is None:
        config = load_config(Path(arguments[0]), arguments[1:])
        validate(config, ranks)
        check_local_shards(config)
    # Importing PyTorch takes seconds.
    from rmoe_megatron.checkpoint.folders import list_checkpoints
    from rmoe_megatron.checkpoint.size import checkpoint_bytes
    from rmoe_megatron.distributed.device import runs_on_cuda
    from rmoe_megatron.training import preflight
    from rmoe_megatron.training.resuming import read_resumed

    if resume is not None:
        if list_checkpoints(resume):
            config, _ = read_resumed(resume, arguments)
        else:
            config = load_config(resume / "config.yaml", [*arguments, f"run_dir={resume}"])
    elif list_checkpoints(Path(config.run_dir)):
        raise UserError(
            f"{config.run_dir} already holds checkpoints; continue it with --resume {config.run_dir} or choose another "
            "run_dir."
        )
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


def report(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Name the folders of training runs.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the page to this file. The default is RUN/report.html, or report.html for several runs."
        ),
    ] = None,
) -> None:
    """Write one HTML page about a run: curves, samples over time, gates, events, configuration; or about several beside each other."""
    launch.require_one_rank("rmoe report")
    for run_dir in run_dirs:
        require_run(run_dir)
    from rmoe_megatron.inspection.report import write_report

    out = out or (run_dirs[0] / "report.html" if len(run_dirs) == 1 else Path("report.html"))
    write_report(run_dirs, out)
    print(out)


def watch(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Name the folders of training runs.")
    ],
    interval: Annotated[
        float, typer.Option(min=0.2, max=3600, help="Read the runs again after so many seconds.")
    ] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Show how the runs are now, and end.")] = False,
) -> None:
    """Show on a live screen how runs are going: loss, speed, gates, checkpoints, restarts, time left. Ctrl-C ends it, not the runs."""
    launch.require_one_rank("rmoe watch")
    for run_dir in run_dirs:
        require_run(run_dir)
    from rmoe_megatron.inspection.watch import watch as watch_runs

    watch_runs(run_dirs, interval, once)
