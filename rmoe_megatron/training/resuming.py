"""Which checkpoint a run goes on from and with which configuration; Megatron-Core is not imported."""

from pathlib import Path

from rmoe_megatron.checkpoint.folders import CheckpointFolder, find_checkpoint, read_state
from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.run import Precision, RunConfig
from rmoe_megatron.errors import UserError

KEPT_SECTIONS = ("model", "recurrence", "lora", "loop", "fine_tuning")


def read_resumed(run_dir: Path, overrides: list[str]) -> tuple[RunConfig, CheckpointFolder]:
    """Return the configuration that a run goes on with, and its newest complete checkpoint.

    Raises:
        UserError: there is no complete checkpoint or no training state, an override is wrong, or it changes what the weights or the
            optimizer's state depend on.
    """
    checkpoint = find_checkpoint(run_dir)
    if read_state(checkpoint.path).get("imported"):
        raise UserError(
            f"{run_dir} holds imported weights and no training state; start a run with fine_tuning.base={run_dir}."
        )
    saved = load_config(checkpoint.path / "config.yaml", [])
    config = load_config(checkpoint.path / "config.yaml", [*overrides, f"run_dir={run_dir}"])
    if config.precision is Precision.auto:
        config.precision = saved.precision  # it was decided when the run started
    if config.fine_tuning and saved.fine_tuning:
        saved.fine_tuning.base = config.fine_tuning.base  # it may have moved; its fingerprint is checked
    _check_goes_on(config, saved, checkpoint)
    return config, checkpoint


def _check_goes_on(config: RunConfig, saved: RunConfig, checkpoint: CheckpointFolder) -> None:
    for section in KEPT_SECTIONS:
        if getattr(config, section) != getattr(saved, section):
            raise UserError(
                f"The checkpoint {checkpoint.path} has another architecture ({section} differs from what is asked "
                f"for); resume without overriding {section}, or train a new run."
            )
    for key, asked, kept in (
        ("engine", config.engine, saved.engine),
        ("optimizer.name", config.optimizer.name, saved.optimizer.name),
        ("precision", config.precision, saved.precision),
        ("diffusion.objective", config.diffusion.objective, saved.diffusion.objective),
        ("diffusion.prediction", config.diffusion.prediction, saved.diffusion.prediction),
    ):
        if asked != kept:
            raise UserError(
                f"{checkpoint.path} was trained with {key}={kept.value}, which its state depends on; resume without "
                "overriding it, or train a new run (fine_tuning.base takes its weights)."
            )
    own = [
        {name for name, rate in vars(each.optimizer.group_learning_rates).items() if rate is not None}
        for each in (config, saved)
    ]
    if own[0] != own[1]:
        raise UserError(
            f"{checkpoint.path} was trained with learning rates of their own for {', '.join(sorted(own[1])) or 'no group'}, which its "
            "optimizer's state is sorted by; give optimizer.group_learning_rates for the same groups (the rates may be others)."
        )
    if config.optimizer.distributed_optimizer != saved.optimizer.distributed_optimizer:
        raise UserError(
            f"{checkpoint.path} was saved with optimizer.distributed_optimizer="
            f"{str(saved.optimizer.distributed_optimizer).lower()}, whose state the other optimizer cannot read; "
            "resume without overriding it."
        )
