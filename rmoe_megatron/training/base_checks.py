"""What a run that starts from another one's weights needs of it, as the configurations say it; no weight is read."""

from dataclasses import replace
from pathlib import Path

from rmoe_megatron.checkpoint.folders import list_checkpoints
from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.model import ModelConfig
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.errors import UserError

# Of what can be added to a model: the keys that the shapes of its weights depend on, whichever blocks have them.
SHAPING = {
    "recurrence": ("num_modules", "rank", "modulation", "gate_inputs"),
    "loop": ("recall",),
    "lora": ("rank",),
}


def check_base(config: RunConfig) -> None:
    """Check that ``fine_tuning.base`` is a run with a checkpoint, of this run's architecture, that has learned the same.

    Raises:
        UserError: there is no such run, or it differs; names the key.
    """
    assert config.fine_tuning is not None
    base = Path(config.fine_tuning.base)
    checkpoints = list_checkpoints(base) if base.is_dir() else []
    if not checkpoints:
        what = "has no checkpoint" if base.is_dir() else "is no folder"
        raise UserError(
            f"There is no run at fine_tuning.base {base}, which {what}; train one or import one with `rmoe convert from-hf`."
        )
    check_fits(config, load_config(checkpoints[0].path / "config.yaml", []))


def check_fits(config: RunConfig, base: RunConfig) -> None:
    """Check that a run can start from the weights of ``base``.

    Raises:
        UserError: it has another architecture, or has learned another objective; names the key.
    """
    assert config.fine_tuning is not None
    name = config.fine_tuning.base
    asked, learned = architecture(config.model), architecture(base.model)
    for key, value in vars(learned).items():
        if getattr(asked, key) != value:
            raise UserError(
                f"fine_tuning.base {name} has another architecture than the model section: its model.{key} is {value}, this run asks for "
                f"{getattr(asked, key)}; leave the key out, or take another base."
            )
    for section, keys in SHAPING.items():
        brought, own = getattr(base, section), getattr(config, section)
        for key in keys if brought is not None and own is not None else ():
            if getattr(own, key) != getattr(brought, key):
                raise UserError(
                    f"fine_tuning.base {name} has {section}.{key}={getattr(brought, key)}, this run asks for {getattr(own, key)}; leave the "
                    "key out, or take another base."
                )
    for key in ("objective", "prediction"):
        learned_value, asked_value = getattr(base.diffusion, key), getattr(config.diffusion, key)
        if learned_value != asked_value:
            raise UserError(
                f"fine_tuning.base {name} has learned diffusion.{key}={learned_value.value}, this run asks for {asked_value.value}; "
                f"set diffusion.{key}={learned_value.value} or take another base."
            )


def architecture(model: ModelConfig) -> ModelConfig:
    """Return the model section without what weights don't depend on: image size, text length, the preset's name.

    An MM-DiT takes a crop of the base's positions, so that fine-tuning may use another resolution.
    """
    return replace(model, preset=None, sample_size=0, text_length=0)
