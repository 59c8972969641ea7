"""Metrics of a run: JSONL and a picture always, TensorBoard and wandb if configured, progress bar or plain lines."""

import json
import logging
import math
import os
import re
import secrets
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tqdm import tqdm

from rmoe_megatron.config.run import LoggingConfig, RunConfig
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.disk_errors import about, warned
from rmoe_megatron.files.regular import open_to_append
from rmoe_megatron.files.untrusted import lines_of, read_text
from rmoe_megatron.training.curves import MAX_BYTES, draw_curves, read_records
from rmoe_megatron.versions import LIBRARIES, versions_of

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
CURVES = "curves.png"
STATUS = "status"  # one line: where the run is
WANDB_ID = "wandb_id.txt"


class RunLogger:
    """Writes what rank 0 reports; on other ranks every call does nothing.

    A resumed run continues the same files: records of steps after ``start_step``, which the resumed run repeats, are
    dropped from the JSONL file and from TensorBoard.

    Args:
        description: what TensorBoard and wandb are to know of the run; see :func:`describe_run`.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LoggingConfig,
        total_steps: int,
        start_step: int,
        is_rank0: bool,
        description: dict[str, Any] | None = None,
    ) -> None:
        self.is_active = is_rank0
        if not is_rank0:
            return
        self.run_dir, self.total_steps, self.start_step = run_dir, total_steps, start_step
        _drop_records_after(run_dir / METRICS, start_step)
        self.jsonl = _Records(run_dir / METRICS)
        self.tensorboard = self.wandb = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _without_errors_of_tensorboard(threading.excepthook)
            with warned("TensorBoard"):
                self.tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
            for name, value in (description or {}).items():
                text = json.dumps(value, indent=2)
                self._tell_tensorboard("add_text", name, f"```\n{text}\n```", start_step)
        if config.wandb is not None:
            import wandb

            own = {"dir": str(run_dir), "id": _wandb_id(run_dir), "resume": "allow"}
            # A resumed run may have other settings than those that wandb knows.
            known = {"config": description or {}, "allow_val_change": True}
            self.wandb = wandb.init(**{**config.wandb, **known, **own})
        self.is_terminal = sys.stderr.isatty()
        self.beside_bar: dict[str, str] = {}
        self.bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            disable=not self.is_terminal,
            dynamic_ncols=True,
            # Not tqdm's ETA, which takes the pause of a checkpoint for the pace of the steps.
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )

    def announce(self, line: str) -> None:
        """Show a line that is not about a step."""
        if self.is_active:
            self._write(line)

    def log_metrics(self, step: int, metrics: dict[str, float], remaining: float | None = None) -> None:
        """Record ``metrics`` for ``step``, the number of optimizer steps done.

        Args:
            remaining: seconds to the end of the run, if that is known.
        """
        if not self.is_active:
            return
        self.jsonl.add(json_text({"step": step, **metrics}))
        for name, value in metrics.items():
            self._tell_tensorboard("add_scalar", name, value, step)
        self._tell_wandb(lambda run: run.log(metrics, step=step))
        self._show(step, metrics, remaining)

    def show_step(self, step: int, loss: float, remaining: float | None = None) -> None:
        """Show a step that is not recorded: on the bar of a terminal; elsewhere the first step of this process alone, as a line."""
        if not self.is_active:
            return
        if step == self.start_step + 1:
            self._show(step, {"loss": loss}, remaining)
        elif self.is_terminal:
            self._move_bar(step, {"loss": loss}, remaining)

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Show a PNG that was written beside the metrics."""
        if not self.is_active:
            return
        if self.tensorboard is not None:
            import numpy as np
            from PIL import Image

            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._tell_tensorboard("add_image", name, pixels, step, dataformats="HWC")
        self._tell_wandb(lambda run: run.log({name: _wandb_image(path)}, step=step))
        self._write(f"step {step}: {name} in {path}")

    def draw_curves(self) -> None:
        """Write the metrics so far as ``curves.png``."""
        if not self.is_active:
            return
        with warned(f"{CURVES} stays as it is"):
            atomic.write(self.run_dir / CURVES, draw_curves(self.run_dir / METRICS))

    def close(self) -> None:
        """Flush and close everything."""
        if not self.is_active:
            return
        self.bar.close()
        self.jsonl.close()
        self._tell_tensorboard("close")
        self._tell_wandb(lambda run: run.finish())

    def _tell_tensorboard(self, method: str, *arguments: Any, **options: Any) -> None:
        """Tell TensorBoard, if it is there; its own thread writes, and says of an error at a later call."""
        if self.tensorboard is None:
            return
        try:
            getattr(self.tensorboard, method)(*arguments, **options)
        except OSError as error:
            self.tensorboard = None
            logger.warning(
                "TensorBoard takes no more of this run (%s); %s has it all, and a resumed run logs to TensorBoard again.",
                error.strerror or error, self.run_dir / METRICS,
            )  # fmt: skip

    def _tell_wandb(self, tell: Callable[[Any], None]) -> None:
        """Tell wandb, if it is there. A signal to the whole job ends its process, which must not end the run."""
        if self.wandb is None:
            return
        try:
            tell(self.wandb)
        except Exception as error:  # of a connection that is gone: wandb's own and the system's
            self.wandb = None
            _forget_wandb()
            logger.warning(
                "wandb takes no more of this run (%s: %s); %s and TensorBoard have it all, and a resumed run logs to wandb "
                "again.", type(error).__name__, error, self.run_dir / METRICS,
            )  # fmt: skip

    def _show(self, step: int, metrics: dict[str, float], remaining: float | None) -> None:
        shown = _shown(metrics, remaining)
        if "loss" in metrics:
            brief = [f"{name} {shown[name]}" for name in ("loss", "ETA") if name in shown]
            with suppress(OSError):  # what cannot be written now is written at the next step
                atomic.write(self.run_dir / STATUS, f"step {step}/{self.total_steps}  {'  '.join(brief)}\n")
        if self.is_terminal and "loss" in metrics:
            self._move_bar(step, metrics, remaining)
            return
        values = "  ".join(f"{name} {value}" for name, value in shown.items())
        self._write(f"step {step}/{self.total_steps}  {values}")

    def _move_bar(self, step: int, metrics: dict[str, float], remaining: float | None) -> None:
        """Show a step on the bar, beside it what is known of this step and else of the last that had it."""
        self.beside_bar |= _shown(metrics, remaining)
        self.bar.set_postfix(self.beside_bar, refresh=False)
        self.bar.update(step - self.bar.n)

    def _write(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)


def describe_run(config: RunConfig) -> dict[str, Any]:
    """Return the whole configuration and the versions of the libraries that train, as values of JSON."""
    whole = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return {"configuration": whole, "versions": versions_of(*LIBRARIES)}


def _without_errors_of_tensorboard(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Say nothing of a disk that TensorBoard's own thread cannot write to: the next call to TensorBoard does."""

    def without(error: Any) -> None:
        is_writer = type(error.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(error.exc_value, OSError)):
            hook(error)

    return without


def _shown(metrics: dict[str, float], remaining: float | None) -> dict[str, str]:
    """Return what a reader of the terminal sees of metrics."""
    shown = {name: f"{value:.4g}" for name, value in metrics.items() if name in SHOWN}
    return shown if remaining is None else {**shown, "ETA": tqdm.format_interval(remaining)}


class _Records:
    """Lines at the end of a file; what the disk does not take now is tried again with the next line, and at the end."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, open_to_append(path)
        self.waiting = b""

    def add(self, line: str) -> None:
        """Put a line on the file."""
        was_waiting = bool(self.waiting)
        self.waiting += f"{line}\n".encode()
        try:
            self._write()
        except OSError as error:
            if not was_waiting:
                with warned("Records wait in memory"), about(self.path):
                    raise error

    def _write(self) -> None:
        while self.waiting:
            self.waiting = self.waiting[os.write(self.file.fileno(), self.waiting) :]

    def close(self) -> None:
        """Try what waits for the last time, and close the file."""
        with suppress(OSError):
            self._write()
        lost = self.waiting.count(b"\n")
        if lost:
            logger.warning("%d records of %s are lost, which its disk did not take.", lost, self.path)
        with suppress(OSError):
            self.file.close()


def _forget_wandb() -> None:
    """Leave nothing for the end of this process to say to a process that is gone."""
    import wandb

    with suppress(Exception):
        wandb.teardown()


def _wandb_image(path: Path) -> Any:
    import wandb

    return wandb.Image(str(path))


SHOWN = ("loss", "validation_loss", "samples_per_second", "tokens_per_second", "model_flops_utilisation")


def json_text(value: Any, indent: int | None = None) -> str:
    """Return JSON; numbers that are not finite, for which JSON has no word, become null."""
    return json.dumps(_without_nan(value), indent=indent, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _wandb_id(run_dir: Path) -> str:
    """Return the id of the run, made once, so that a resumed run continues it."""
    path = run_dir / WANDB_ID
    if not os.path.lexists(path):
        atomic.write(path, secrets.token_hex(4))
    name = read_text(path, max_bytes=1000).strip()
    if re.fullmatch(r"[\w-]{1,64}", name, re.ASCII) is None:
        raise UserError(f"{path} holds no id of wandb's; remove it to log as a new one.")
    return name


def _drop_records_after(path: Path, step: int) -> None:
    """Keep the whole records up to ``step``; a killed run may have left later ones and a torn line."""
    if not os.path.lexists(path):
        return
    records, lines = read_records(path), lines_of(read_text(path, MAX_BYTES))
    kept = [line for (recorded, _), line in zip(records, lines, strict=False) if recorded <= step]
    atomic.write(path, "".join(line + "\n" for line in kept))
