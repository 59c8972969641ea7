"""Checks of how a model is trained that need nothing but the configuration: no file, process group or download."""

import difflib
import inspect
from typing import Any

from rmoe_megatron.config.bounds import check_bounds
from rmoe_megatron.config.captions import parse_captions
from rmoe_megatron.config.engine_checks import check_engine
from rmoe_megatron.config.layout_checks import check_batch, check_layout
from rmoe_megatron.config.precision_checks import check_precision
from rmoe_megatron.config.require import require, require_blocks, require_divides
from rmoe_megatron.config.run import (
    MUON_MOMENTUM,
    FineTuningConfig,
    LearningRateDecay,
    OptimizerName,
    RunConfig,
    Trainable,
)
from rmoe_megatron.config.sample_filter import SampleFilter
from rmoe_megatron.errors import UserError

WANDB_MODES = ("online", "offline", "disabled", "shared")


def validate(config: RunConfig, world_size: int) -> None:
    """Check every value and the parallel layout for ``world_size`` ranks; what the model is, is checked in ``model/``.

    Raises:
        UserError: names the key, the value and what is allowed.
    """
    check_bounds(config)
    _check_schedule(config)
    _check_muon(config)
    if config.fine_tuning is not None:
        _check_fine_tuning(config, config.fine_tuning)
    _check_data(config)
    _check_stages(config)
    _check_kept(config)
    check_engine(config)
    check_layout(config, world_size)
    check_batch(config, world_size)
    check_precision(config)
    check_wandb(config.logging.wandb)
    _check_prompts(config)
    _check_evaluations(config)
    parse_captions(config.data.captions)
    if config.data.filter is not None:
        SampleFilter(config.data.filter)


def _check_kept(config: RunConfig) -> None:
    checkpoint, training = config.checkpoint, config.training
    require(
        checkpoint.keep_every is None or checkpoint.keep_every % checkpoint.every == 0,
        f"checkpoint.keep_every ({checkpoint.keep_every}) must be a multiple of checkpoint.every ({checkpoint.every}), whose steps are saved.",
    )
    has_validation = config.data.validation is not None and checkpoint.every % training.validate_every == 0
    require(
        checkpoint.keep_best == 0 or has_validation,
        f"checkpoint.keep_best ({checkpoint.keep_best}) needs the validation loss of every step that is saved; set data.validation, and "
        f"training.validate_every ({training.validate_every}) to what divides checkpoint.every ({checkpoint.every}).",
    )


def _check_schedule(config: RunConfig) -> None:
    optimizer, training = config.optimizer, config.training
    require(
        optimizer.warmup_steps < training.steps,
        f"optimizer.warmup_steps ({optimizer.warmup_steps}) must be less than training.steps ({training.steps}).",
    )
    require(
        optimizer.min_learning_rate <= optimizer.learning_rate,
        f"optimizer.min_learning_rate ({optimizer.min_learning_rate}) must not exceed optimizer.learning_rate "
        f"({optimizer.learning_rate}).",
    )
    for group in ("recurrence", "gate"):
        require(
            getattr(optimizer.group_learning_rates, group) is None or config.recurrence is not None,
            f"optimizer.group_learning_rates.{group} is for a model with a recurrence, and this one has none; leave it out.",
        )
    require(
        optimizer.group_learning_rates.base is None
        or config.fine_tuning is None
        or config.fine_tuning.trainable is not Trainable.added,
        "optimizer.group_learning_rates.base is for a base that is trained, and fine_tuning.trainable=added freezes it; leave it out.",
    )
    style, falls_in = optimizer.lr_decay_style, optimizer.wsd_decay_steps
    require(
        style is not LearningRateDecay.constant or optimizer.min_learning_rate == 0,
        "optimizer.min_learning_rate is never reached with lr_decay_style=constant; leave it out, or let the learning rate decay.",
    )
    require(
        (style is LearningRateDecay.wsd) == (falls_in is not None),
        f"optimizer.wsd_decay_steps belongs to lr_decay_style=wsd, and this run has lr_decay_style={style.value}; set both or neither.",
    )
    require(
        falls_in is None or falls_in <= training.steps - optimizer.warmup_steps,
        f"optimizer.wsd_decay_steps ({falls_in}) must not exceed training.steps ({training.steps}) without the "
        f"{optimizer.warmup_steps} steps of warm-up.",
    )


def _check_muon(config: RunConfig) -> None:
    """Muon moves whole matrices of float32 or bf16, and is proved where all of a model is trained."""
    optimizer, fine_tuning = config.optimizer, config.fine_tuning
    if optimizer.name is not OptimizerName.muon:
        require(
            optimizer.muon_momentum == MUON_MOMENTUM,
            "optimizer.muon_momentum is for optimizer.name=muon; leave it out.",
        )
        return
    require(
        not optimizer.distributed_optimizer,
        "optimizer.name=muon needs its matrices whole on every data-parallel rank; set optimizer.distributed_optimizer=false.",
    )
    refused = {
        f"precision={config.precision.value}": config.precision.is_below_bf16,
        "lora": config.lora is not None,
        "frozen weights; set fine_tuning.trainable=all": (
            fine_tuning is not None and fine_tuning.trainable is not Trainable.all
        ),
        "training.compile=true": config.training.compile,
    }
    for what, is_set in refused.items():
        require(not is_set, f"optimizer.name=muon is not for {what}; or take optimizer.name=adamw.")


def _check_data(config: RunConfig) -> None:
    data = config.data
    require(
        (data.train is None) == bool(data.mixture),
        "Set one of data.train and data.mixture: a folder of shards, or several with weights.",
    )
    given = [(each.weight is not None, each.epochs is not None) for each in data.mixture]
    require(
        not given or set(given) in ({(True, False)}, {(False, True)}),
        "Every entry of data.mixture needs a weight, or every entry epochs; give all of them the same one.",
    )
    if data.buckets is not None:
        require(
            not config.model.is_class_conditional,
            "data.buckets is for an MM-DiT; a DiT's position embedding is of one size: set data.buckets=null.",
        )


def _check_stages(config: RunConfig) -> None:
    training, model, stages = config.training, config.model, config.training.stages
    if not stages:
        return
    total = sum(stage.steps for stage in stages)
    require(
        total == training.steps,
        f"training.stages take {total} steps, but training.steps is {training.steps}; make them equal.",
    )
    require(
        not model.is_class_conditional,
        "training.stages are for an MM-DiT; a DiT's position embedding is of one size: leave them out.",
    )
    require(
        config.data.buckets is None or not config.data.buckets.sizes or len(stages) == 1,
        "data.buckets.sizes are those of one resolution; with training.stages leave them out, and each stage makes its own.",
    )
    for number, stage in enumerate(stages):
        require_divides(
            model.patch_size, "model.patch_size", stage.sample_size, f"training.stages[{number}].sample_size"
        )
        require(
            stage.sample_size // model.patch_size <= model.pos_embed_max_size,
            f"training.stages[{number}].sample_size ({stage.sample_size}) is more than model.pos_embed_max_size "
            f"({model.pos_embed_max_size}) patches.",
        )


def _check_fine_tuning(config: RunConfig, fine_tuning: FineTuningConfig) -> None:
    trainable = fine_tuning.trainable
    require(
        trainable is not Trainable.added or config.recurrence is not None or config.lora is not None,
        "fine_tuning.trainable=added trains recurrence or LoRA, but both are null; add one or train blocks or all.",
    )
    if trainable is Trainable.blocks:
        require_blocks("fine_tuning.blocks", fine_tuning.blocks, config.model.num_layers)
    else:
        require(
            not fine_tuning.blocks,
            f"fine_tuning.blocks is for trainable=blocks, but trainable is {trainable.value}.",
        )


def _check_prompts(config: RunConfig) -> None:
    """A class-conditional run draws class labels."""
    if not config.model.is_class_conditional:
        return
    classes = config.model.num_classes
    for prompt in config.training.sample_prompts:
        require(
            prompt.isdigit() and int(prompt) < classes,
            f"training.sample_prompts has {prompt!r}, but this model draws class labels 0 to {classes - 1}.",
        )


# What a run can be scored by between steps: how many judges it has, and whether its prompts come from a file or a folder.
_EVALUATIONS = {
    "shapes": (0, False),
    "mazes": (0, True),
    "geneval": (2, False),
    "geneval2": (1, True),
    "dpg": (1, True),
    "corebench": (1, True),
    "pickscore": (2, True),
}


def _check_evaluations(config: RunConfig) -> None:
    evaluations = config.training.evaluations
    for number, evaluation in enumerate(evaluations):
        where, name = f"training.evaluations[{number}]", evaluation.name
        require(
            name in _EVALUATIONS,
            f"{where}.name is {name!r:.40}; a run can be scored between steps by {', '.join(_EVALUATIONS)}. Export the run and give the "
            "folder to `rmoe eval` for other benchmarks.",
        )
        require(
            name not in [each.name for each in evaluations[:number]],
            f"{where}.name is {name!r}, as that of an earlier one; leave one of them out.",
        )
        judges, needs_data = _EVALUATIONS[name]
        require(
            len(evaluation.judges) in (0, judges),
            f"{where}.judges has {len(evaluation.judges)} models, but {name} has {judges} judges; name them all, or none for the published "
            "ones.",
        )
        require(
            name != "dpg" or evaluation.judges != ["mplug"],
            f"{where}.judges has mplug, which dpg is not asked of between steps; name a Qwen3-VL.",
        )
        require(
            evaluation.data is not None or not needs_data,
            f"{where}.data is null; {name} needs the table or folder of its prompts.",
        )
        require(
            evaluation.data is None or name != "shapes",
            f"{where}.data is {evaluation.data!r:.60}, but the scenes of shapes come from no file; leave it out.",
        )
    if not evaluations:
        return
    require(
        not config.model.is_class_conditional,
        "training.evaluations needs a model of captions; this one draws classes: leave it out.",
    )
    require(
        not config.training.stages and config.data.buckets is None,
        "training.evaluations has pictures of one size; leave training.stages and data.buckets out, or the evaluations.",
    )


def check_wandb(arguments: dict[str, Any] | None) -> None:
    """Check the arguments of ``wandb.init``.

    Raises:
        UserError: names the argument that wandb does not have, that a run sets itself, or whose value is wrong.
    """
    if arguments is None:
        return
    import wandb  # takes half a second

    known = set(inspect.signature(wandb.init).parameters) - {"settings"}
    for key, value in arguments.items():
        if key not in known:
            nearest = difflib.get_close_matches(str(key), sorted(known), n=1)
            suggestion = f"did you mean {nearest[0]}?" if nearest else "see wandb.init for what it takes."
            raise UserError(f"logging.wandb has {key!r}, which wandb.init does not take; {suggestion}")
        require(
            key not in ("dir", "id", "resume", "config", "allow_val_change"),
            f"logging.wandb.{key} is set by the run itself; leave it out.",
        )
        entries = value if isinstance(value, list) else [value]
        require(
            all(isinstance(entry, str | int | float | bool | None) for entry in entries),
            f"logging.wandb.{key} is {value!r}; give a text, a number or a list of them.",
        )
    mode = arguments.get("mode", "online")
    require(mode in WANDB_MODES, f"logging.wandb.mode is {mode!r}; it is one of {', '.join(WANDB_MODES)}.")
