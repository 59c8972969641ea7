"""Checks of a configuration before any process group, download or file is touched."""

import difflib
import inspect
import tempfile
from pathlib import Path
from typing import Any

import torch

from rmoe_megatron.config.bounds import check_bounds
from rmoe_megatron.config.schema import (
    Architecture,
    Device,
    FineTuningConfig,
    ModelConfig,
    Objective,
    ParallelConfig,
    Prediction,
    RunConfig,
    Trainable,
)
from rmoe_megatron.data.shards import list_shards
from rmoe_megatron.errors import UserError

GATE_INPUTS = ("tokens", "conditioning")
SD3_ENCODERS = ("clip_l", "clip_g", "t5")
WANDB_MODES = ("online", "offline", "disabled", "shared")


def validate(config: RunConfig, world_size: int) -> None:
    """Check every value, the parallel layout for ``world_size`` ranks, and the folders.

    Raises:
        UserError: names the key, the value and what is allowed.
    """
    check_bounds(config)
    _check_schedule(config)
    check_model(config)
    check_layout(config, world_size)
    _check_batch(config, world_size)
    check_wandb(config.logging.wandb)
    if config.device is Device.cuda and not torch.cuda.is_available():
        raise UserError("device is cuda but PyTorch finds no GPU here; set device=cpu or device=auto.")
    if config.fine_tuning is not None and not Path(config.fine_tuning.base).is_dir():
        raise UserError(
            f"There is no run at fine_tuning.base {config.fine_tuning.base}; train one or import one with "
            "`rmoe convert from-hf`."
        )
    _check_prompts(config)
    list_shards(Path(config.data.train))
    if config.data.validation is not None:
        list_shards(Path(config.data.validation))
    check_writable(Path(config.run_dir), "run_dir")


def _check_prompts(config: RunConfig) -> None:
    """A class-conditional run draws class labels."""
    if config.model.architecture is not Architecture.dit:
        return
    classes = config.model.num_classes
    for prompt in config.training.sample_prompts:
        _require(
            prompt.isdigit() and int(prompt) < classes,
            f"training.sample_prompts has {prompt!r}, but a DiT draws class labels 0 to {classes - 1}.",
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
        _require(
            key not in ("dir", "id", "resume"), f"logging.wandb.{key} is set by the run itself; leave it out."
        )
        entries = value if isinstance(value, list) else [value]
        _require(
            all(isinstance(entry, str | int | float | bool | None) for entry in entries),
            f"logging.wandb.{key} is {value!r}; give a text, a number or a list of them.",
        )
    mode = arguments.get("mode", "online")
    _require(mode in WANDB_MODES, f"logging.wandb.mode is {mode!r}; it is one of {', '.join(WANDB_MODES)}.")


def check_writable(folder: Path, name: str) -> None:
    """Check that ``folder`` can be created or written to.

    Raises:
        UserError: a parent is a file, or permission is missing.
    """
    existing = folder
    try:
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise UserError(
                f"{name} {folder} cannot be written: {existing} is a file; choose another folder."
            )
        # Permission bits say nothing to root or about read-only and virtual file systems; a file does.
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise UserError(
            f"{name} {folder} cannot be written: {error.strerror} in {existing}; choose another folder."
        ) from error


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _divides(divisor: int, divisor_name: str, number: int, number_name: str) -> None:
    _require(
        number % divisor == 0, f"{number_name} ({number}) is not divisible by {divisor_name} ({divisor})."
    )


def _check_schedule(config: RunConfig) -> None:
    optimizer, training = config.optimizer, config.training
    _require(
        optimizer.warmup_steps < training.steps,
        f"optimizer.warmup_steps ({optimizer.warmup_steps}) must be less than training.steps ({training.steps}).",
    )
    _require(
        optimizer.min_learning_rate <= optimizer.learning_rate,
        f"optimizer.min_learning_rate ({optimizer.min_learning_rate}) must not exceed optimizer.learning_rate "
        f"({optimizer.learning_rate}).",
    )


def check_model(config: RunConfig) -> None:
    """Check the model, what is added to it, its objective and what of it is trained.

    Raises:
        UserError: names the key, the value and what is allowed.
    """
    model, recurrence = config.model, config.recurrence
    for section in ("model", "recurrence", "lora", "diffusion", "encoders"):
        if getattr(config, section) is not None:
            check_bounds(getattr(config, section), f"{section}.")
    _divides(model.patch_size, "model.patch_size", model.sample_size, "model.sample_size")
    _divides(model.num_attention_heads, "model.num_attention_heads", model.hidden_size, "model.hidden_size")
    head_size = model.hidden_size // model.num_attention_heads
    _require(
        head_size % 2 == 0, f"model.hidden_size / model.num_attention_heads must be even, it is {head_size}."
    )
    # Sines and cosines of two axes share the positional embedding.
    _require(
        model.hidden_size % 4 == 0, f"model.hidden_size must be a multiple of 4, it is {model.hidden_size}."
    )
    if model.architecture is Architecture.mmdit:
        _check_mmdit(model)
    else:
        _check_dit(model)
    _check_objective(config)
    _check_blocks("model.dual_attention_layers", model.dual_attention_layers, model, may_be_empty=True)
    if config.lora is not None:
        _check_blocks("lora.layers", config.lora.layers, model)
        _check_rank("lora.rank", config.lora.rank, model)
        _require(recurrence is None, "lora and recurrence exclude each other; set one of them to null.")
    if config.fine_tuning is not None:
        _check_fine_tuning(config, config.fine_tuning)
    if recurrence is None:
        return
    _check_blocks("recurrence.layers", recurrence.layers, model)
    if recurrence.rank is not None:
        _check_rank("recurrence.rank", recurrence.rank, model)
    inputs = recurrence.gate_inputs
    _require(
        len(inputs) > 0 and set(inputs) <= set(GATE_INPUTS),
        f"recurrence.gate_inputs {inputs} must be one or both of {', '.join(GATE_INPUTS)}.",
    )


def _check_rank(name: str, rank: int, model: ModelConfig) -> None:
    _require(
        rank <= model.hidden_size,
        f"{name} ({rank}) exceeds model.hidden_size ({model.hidden_size}), where a product of two factors has no use "
        "for it; choose a smaller rank.",
    )


def _check_mmdit(model: ModelConfig) -> None:
    for name in ("text_length", "text_hidden_size", "pooled_size", "pos_embed_max_size"):
        value = getattr(model, name)
        _require(value > 0, f"model.{name} must be greater than 0 for an MM-DiT, it is {value}.")
    for name in ("num_classes", "learned_sigma"):
        value = getattr(model, name)
        _require(not value, f"model.{name} is {value}, but an MM-DiT has none; set architecture=dit.")
    for name in ("mlp_norm_eps", "downscale_freq_shift"):
        value = getattr(model, name)
        _require(
            value == getattr(ModelConfig, name),
            f"model.{name} is {value}, but an MM-DiT has it fixed; leave it out.",
        )
    patches = model.sample_size // model.patch_size
    _require(
        model.pos_embed_max_size >= patches,
        f"model.pos_embed_max_size ({model.pos_embed_max_size}) must be at least sample_size / patch_size ({patches}).",
    )


def _check_dit(model: ModelConfig) -> None:
    _require(
        model.num_classes > 0,
        f"model.num_classes must be greater than 0 for a DiT, it is {model.num_classes}.",
    )
    _require(
        model.downscale_freq_shift in (0, 1),
        f"model.downscale_freq_shift must be 1 (diffusers' DiT) or 0 (the original), it is {model.downscale_freq_shift}.",
    )
    for name in (
        "text_length",
        "text_hidden_size",
        "pooled_size",
        "pos_embed_max_size",
        "dual_attention_layers",
        "qk_norm",
    ):
        value = getattr(model, name)
        _require(not value, f"model.{name} is {value}, but a DiT has none; leave it out (qk_norm: false).")


def _check_objective(config: RunConfig) -> None:
    diffusion, is_ddpm = config.diffusion, config.diffusion.objective is Objective.ddpm
    _require(
        is_ddpm or not config.model.learned_sigma,
        "model.learned_sigma needs diffusion.objective=ddpm; rectified flow has no variance to learn.",
    )
    _require(
        not is_ddpm or diffusion.prediction is Prediction.velocity,
        "diffusion.prediction=sample needs diffusion.objective=rectified_flow; DDPM predicts the noise.",
    )
    _require(
        diffusion.prediction is Prediction.velocity or config.model.architecture is Architecture.mmdit,
        "diffusion.prediction=sample is for MM-DiTs; a DiT predicts velocity or noise.",
    )
    _require(
        is_ddpm or diffusion.min_snr_gamma is None,
        "diffusion.min_snr_gamma needs diffusion.objective=ddpm; rectified flow weights by its timestep_density.",
    )
    unknown = sorted(set(config.encoders.dropped) - set(SD3_ENCODERS))
    _require(not unknown, f"encoders.dropped {unknown} must be among {', '.join(SD3_ENCODERS)}.")
    _require(
        not config.encoders.dropped or config.encoders.text_encoder != "minilm",
        f"encoders.dropped {config.encoders.dropped} is for Stable Diffusion 3's text encoders, but encoders.text_encoder "
        "is minilm; set encoders.dropped=[].",
    )


def _check_fine_tuning(config: RunConfig, fine_tuning: FineTuningConfig) -> None:
    trainable = fine_tuning.trainable
    _require(
        trainable is not Trainable.added or config.recurrence is not None or config.lora is not None,
        "fine_tuning.trainable=added trains recurrence or LoRA, but both are null; add one or train blocks or all.",
    )
    if trainable is Trainable.blocks:
        _check_blocks("fine_tuning.blocks", fine_tuning.blocks, config.model)
    else:
        _require(
            not fine_tuning.blocks,
            f"fine_tuning.blocks is for trainable=blocks, but trainable is {trainable.value}.",
        )


def _check_blocks(name: str, layers: list[int], model: ModelConfig, may_be_empty: bool = False) -> None:
    _require(
        may_be_empty or len(layers) > 0,
        f"{name} is empty; name at least one block or set {name.partition('.')[0]}=null.",
    )
    _require(len(set(layers)) == len(layers), f"{name} {layers} names a block twice.")
    for layer in layers:
        _require(
            0 <= layer < model.num_layers,
            f"{name} names block {layer}, but blocks are numbered 0 to {model.num_layers - 1}.",
        )


def check_layout(config: RunConfig, world_size: int) -> None:
    """Check that the model can be spread over ``world_size`` ranks as configured.

    Raises:
        UserError: says which numbers don't divide.
    """
    model, parallel = config.model, config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    context, virtual = parallel.context_parallel_size, parallel.virtual_pipeline_model_parallel_size
    _divides(
        tensor * context * pipeline,
        "tensor_model_parallel_size x context_parallel_size x pipeline_model_parallel_size = "
        f"{tensor} x {context} x {pipeline}",
        world_size,
        "The number of ranks",
    )
    _require(
        parallel.sequence_parallel == (tensor > 1),
        f"parallel.sequence_parallel is {str(parallel.sequence_parallel).lower()} with "
        f"tensor_model_parallel_size={tensor}; the two go together (tensor parallelism alone would hold every "
        f"activation on every rank): set sequence_parallel={str(tensor > 1).lower()}.",
    )
    _divides(
        tensor, "parallel.tensor_model_parallel_size", model.num_attention_heads, "model.num_attention_heads"
    )
    _divides(
        tensor * context,
        f"tensor_model_parallel_size x context_parallel_size = {tensor} x {context}",
        (model.sample_size // model.patch_size) ** 2,
        "The number of patches of an image",
    )
    _divides(
        pipeline * virtual,
        f"pipeline_model_parallel_size x virtual_pipeline_model_parallel_size = {pipeline} x {virtual}",
        model.num_layers,
        "model.num_layers",
    )
    _require(
        virtual == 1 or pipeline > 1,
        f"parallel.virtual_pipeline_model_parallel_size={virtual} needs pipeline_model_parallel_size greater than 1.",
    )
    _check_trained_stages(config)
    _check_expert_parallelism(config, world_size // pipeline)
    _check_overlap(config)


def _check_trained_stages(config: RunConfig) -> None:
    """Megatron-Core's optimizer and schedules need a trained parameter on every stage."""
    if config.fine_tuning is None or config.fine_tuning.trainable is Trainable.all:
        return
    parallel, addition = config.parallel, config.recurrence or config.lora
    if config.fine_tuning.trainable is Trainable.blocks:
        trained = config.fine_tuning.blocks
    else:
        trained = addition.layers if addition is not None else []
    chunks = parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size
    size = config.model.num_layers // chunks
    for first in range(0, config.model.num_layers, size):
        _require(
            chunks == 1 or any(first <= layer < first + size for layer in trained),
            f"Blocks {first} to {first + size - 1} make a pipeline stage and none of them is trained (trained are "
            f"{trained}); every stage needs one: choose other blocks or a smaller pipeline.",
        )


def _check_expert_parallelism(config: RunConfig, stage_ranks: int) -> None:
    """Experts are spread over the ranks of a pipeline stage, tensor-parallel ones first."""
    expert = config.parallel.expert_model_parallel_size
    if config.recurrence is None:
        _require(
            expert == 1,
            f"parallel.expert_model_parallel_size is {expert} but the model has no experts (recurrence is null).",
        )
        return
    _divides(
        expert, "parallel.expert_model_parallel_size", stage_ranks, "The number of ranks of a pipeline stage"
    )
    modules = config.recurrence.num_modules
    _divides(expert, "parallel.expert_model_parallel_size", modules, "recurrence.num_modules")


def _check_overlap(config: RunConfig) -> None:
    parallel = config.parallel
    _require(
        not parallel.overlap_param_gather
        or (parallel.overlap_grad_reduce and config.optimizer.distributed_optimizer),
        "parallel.overlap_param_gather needs parallel.overlap_grad_reduce=true and "
        "optimizer.distributed_optimizer=true.",
    )
    _require(
        parallel.bucket_size is None or parallel.overlap_grad_reduce,
        f"parallel.bucket_size is {parallel.bucket_size}, which needs parallel.overlap_grad_reduce=true.",
    )


def _check_batch(config: RunConfig, world_size: int) -> None:
    training, parallel = config.training, config.parallel
    data = data_parallel_size(parallel, world_size)
    _divides(
        training.micro_batch_size * data,
        f"micro_batch_size x data-parallel ranks = {training.micro_batch_size} x {data}",
        training.global_batch_size,
        "training.global_batch_size",
    )
    if parallel.virtual_pipeline_model_parallel_size > 1:
        _divides(
            parallel.pipeline_model_parallel_size,
            "parallel.pipeline_model_parallel_size",
            training.global_batch_size // (training.micro_batch_size * data),
            "The number of micro-batches per step, for the interleaved schedule,",
        )


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """Return how many replicas of the model ``world_size`` ranks hold."""
    return world_size // (
        parallel.tensor_model_parallel_size
        * parallel.context_parallel_size
        * parallel.pipeline_model_parallel_size
    )
