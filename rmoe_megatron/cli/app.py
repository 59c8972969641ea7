"""The command line: ``rmoe data``, ``train``, ``inspect`` and so on. Each command stands in a file beside this one."""

import logging
import os
import sys
import warnings
from typing import Annotated, NoReturn

import typer

from rmoe_megatron.cli import standard_streams
from rmoe_megatron.cli.config import config_command
from rmoe_megatron.cli.conversion import convert_app
from rmoe_megatron.cli.data import data_app
from rmoe_megatron.cli.diagnosis import diagnose_app
from rmoe_megatron.cli.options import Bar
from rmoe_megatron.cli.plan import plan_command
from rmoe_megatron.cli.prompt_benchmarks import eval_app
from rmoe_megatron.cli.sample import sample
from rmoe_megatron.cli.train import inspect, report, train, watch
from rmoe_megatron.distributed import launch
from rmoe_megatron.errors import Interrupted, RunError, UserError, exit_code
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
app.command("config", epilog="Example: rmoe config optimizer.ema_decay")(config_command)
app.command("train", epilog="Example: rmoe train configs/shapes_tiny.yaml optimizer.learning_rate=1e-3")(
    train
)
app.command("inspect", epilog="Example: rmoe inspect runs/shapes_tiny")(inspect)
app.command("watch", epilog="Example: rmoe watch runs/shapes_tiny")(watch)
app.command(
    "report", epilog="Example: rmoe report runs/shapes_tiny runs/shapes_tiny_dense --out report.html"
)(report)
app.command(
    "sample", epilog="Example: rmoe sample models/shapes_tiny --prompt 'two red circles' --out samples"
)(sample)


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
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
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
    if launch.is_main_process():
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
