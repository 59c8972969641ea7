"""What several commands of the command line take, the progress bar that they show, and what they say when Ctrl-C ends them."""

import functools
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, ClassVar

import typer
from tqdm import tqdm

from rmoe_megatron.distributed import launch
from rmoe_megatron.distributed.stop_signals import CTRL_C
from rmoe_megatron.errors import Interrupted, UserError
from rmoe_megatron.files.untrusted import lines_of, read_text

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Override settings of the file."),
]
ParallelOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[parallel.KEY=VALUE]...", help="Lay out the ranks that import."),
]
Seed = Annotated[
    int, typer.Option(min=0, max=(1 << 32) - 1, help="Draw the noise of the first image from this seed.")
]
Steps = Annotated[int, typer.Option(min=1, max=1000, help="Let the sampler take so many steps.")]
Guidance = Annotated[float, typer.Option(help="Scale classifier-free guidance by this. 1 is no guidance.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="Compute in fp32, fp16 or bf16. With auto it is bf16 on a GPU, and on a CPU the faster of bf16 and fp32."
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        help="Draw this prompt, or this class label of a DiT. The option can be given several times."
    ),
]
PromptsFile = Annotated[Path | None, typer.Option(help="Draw the prompts of this text file, one a line.")]
Depth = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        help="Pass so many loops, or latent steps. The default is what the model was trained with.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, max=4096, help="Make so many images at a time.")]


class Bar:
    """A progress callback (done, total) that shows a bar with rate and ETA from its first call on.

    Attributes:
        shown: the bars that are not at their end.
    """

    shown: ClassVar[list[tqdm]] = []

    def __init__(self, description: str, unit: str) -> None:
        self.description, self.unit = description, unit
        self.bar: tqdm | None = None

    def __call__(self, done: int, total: int) -> None:
        """Show how much is done of how much."""
        if self.bar is None:  # not before: a mistake found first has its line to itself
            self.bar = tqdm(
                desc=self.description, unit=self.unit, total=total, mininterval=1.0, dynamic_ncols=True
            )
            self.shown.append(self.bar)
        self.bar.update(done - self.bar.n)
        if done == total:
            self.bar.close()

    @classmethod
    def end_lines(cls) -> None:
        """Leave the lines of all bars, so that what is printed next begins a new one."""
        while cls.shown:
            cls.shown.pop().close()


def keeping[**P](what: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Return a decorator of commands that keep what is finished when Ctrl-C ends them, and go on from there.

    Args:
        what: is kept, in the plural.
    """

    def decorator(command: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(command)
        def interruptible(*arguments: P.args, **named: P.kwargs) -> None:
            try:
                command(*arguments, **named)
            except KeyboardInterrupt:
                again = shlex.join(["rmoe", *sys.argv[1:]])
                raise Interrupted(f"Ctrl-C: {what} are kept; `{again}` goes on from there.", CTRL_C) from None

        return interruptible

    return decorator


def check_guidance(guidance: float, interval: tuple[float, float] = (0.0, 1.0)) -> None:
    """Check the scale of guidance and where it is applied.

    Raises:
        UserError: the scale is not finite or absurd, or the interval none in [0, 1].
    """
    if not -1000 <= guidance <= 1000:
        raise UserError(f"--guidance {guidance} must lie between -1000 and 1000; 1 is no guidance.")
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise UserError(
            f"--guidance-interval {interval[0]} {interval[1]} must be two numbers from 0 to 1, the smaller one first."
        )


def require_model(name: str) -> None:
    """Check that a model is a folder, or may be a repository of the hub, before anything slow is imported.

    Raises:
        UserError: it is neither.
    """
    if not Path(name).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is None:
        raise UserError(f"{name} is no folder; name one, or a repository of the hub (owner/name).")


def require_pipeline(name: str) -> None:
    """Check that a model is a diffusers folder, or may be such a repository of the hub, before anything slow is imported.

    Raises:
        UserError: it is neither.
    """
    require_model(name)
    if Path(name).exists() and not Path(name, "model_index.json").is_file():
        raise UserError(
            f"{name} is not a diffusers folder (no model_index.json); make one with `rmoe convert to-hf`."
        )


def require_run(run_dir: Path) -> None:
    """Check that there is the folder of a run, before anything slow is imported.

    Raises:
        UserError: there is none.
    """
    if not run_dir.is_dir():
        raise UserError(f"There is no run at {run_dir}; give the run_dir of an earlier `rmoe train`.")


def parse_part(part: str) -> tuple[int, int]:
    """Return which part of how many ``K/N`` is.

    Raises:
        UserError: it is none.
    """
    numbers = part.split("/")
    if len(numbers) != 2 or not all(
        number.isascii() and number.isdigit() and len(number) < 8 for number in numbers
    ):
        raise UserError(f"--part {part!r:.40} must be K/N, like 0/8.")
    number, count = map(int, numbers)
    if number >= count:
        raise UserError(f"--part {part} must have K less than N, like 0/8.")
    return number, count


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Return the whole numbers of ``4,8,12``.

    Raises:
        UserError: it is none.
    """
    numbers = text.split(",")
    if not all(number.isascii() and number.isdigit() and len(number) < 8 for number in numbers):
        raise UserError(f"{option} {text!r:.40} must be whole numbers with commas between them, like 4,8,12.")
    return tuple(map(int, numbers))


def read_prompts(prompts: list[str], file: Path | None) -> list[str]:
    """Return the prompts of the command line and those of the file.

    Raises:
        UserError: the file is no text, or there is no prompt.
    """
    if file is not None:
        prompts = [
            *prompts,
            *(line.strip() for line in lines_of(read_text(file, follow=True)) if line.strip()),
        ]
    if not prompts:
        raise UserError("There is no prompt; give --prompt TEXT or --prompts-file FILE.")
    return prompts


def told_to_all_ranks() -> AbstractContextManager[None]:
    """Return the context of what ranks do together: what ends one before they have met is told to those who wait for it."""
    if launch.world_size() == 1:
        return nullcontext()
    from rmoe_megatron.distributed.rank_watch import telling_all_ranks

    return telling_all_ranks()
