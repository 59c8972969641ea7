"""Checks of eight- and four-bit precisions: what their layers and recipes can do."""

from rmoe_megatron.config.require import require, require_divides
from rmoe_megatron.config.run import Backend, Fp8Config, Fp8Recipe, Precision, Recompute, RunConfig
from rmoe_megatron.config.stages import stages_of


def check_precision(config: RunConfig) -> None:
    """Check that the precision goes with recipe, blocks, backend and parallel layout.

    Raises:
        UserError: says which two exclude each other.
    """
    precision, parallel, fp8 = config.precision, config.parallel, config.fp8
    if not precision.is_below_bf16:
        require(
            fp8 == Fp8Config(),
            f"The section fp8 is for the precisions of eight and four bits, but precision is {precision.value}; leave it out.",
        )
        return
    name = precision.value
    kept = fp8.num_layers_at_start_in_bf16 + fp8.num_layers_at_end_in_bf16
    require(
        kept < config.model.num_layers,
        f"fp8 keeps {kept} blocks at start and end in bf16, which are all of the model's {config.model.num_layers}; lower "
        "fp8.num_layers_at_start_in_bf16 or fp8.num_layers_at_end_in_bf16.",
    )
    require(
        precision is not Precision.fp8 or config.backend is not Backend.local,
        "precision=fp8 is Transformer Engine's, but backend is local; set backend=auto, or precision=fp8_emulated.",
    )
    require(
        precision is not Precision.fp8 or fp8.recipe is not Fp8Recipe.delayed or kept == 0,
        "fp8.recipe=delayed has one history for all blocks: set fp8.num_layers_at_start_in_bf16=0 and "
        "fp8.num_layers_at_end_in_bf16=0.",
    )
    if not precision.is_emulated:
        for key, is_set in (
            ("compile", config.training.compile),
            ("recompute", config.training.recompute is not Recompute.none),
        ):
            require(
                not is_set,
                f"training.{key} is not for precision=fp8: Transformer Engine's layers are not traced, and what is computed twice "
                f"would not be in FP8 the second time; leave training.{key} out.",
            )
        _check_products(config)
        return
    require(
        config.backend is not Backend.transformer_engine,
        f"precision={name} has layers of its own; set backend=auto or backend=local.",
    )
    for key in ("tensor_model_parallel_size", "context_parallel_size"):
        require(
            getattr(parallel, key) == 1,
            f"precision={name} rounds whole tensors and is not for {key}={getattr(parallel, key)}; set it to 1.",
        )
    require(
        fp8.recipe is not Fp8Recipe.delayed or config.training.recompute is Recompute.none,
        f"fp8.recipe=delayed would see what training.recompute={config.training.recompute.value} computes twice as two calls; set "
        "training.recompute=none.",
    )
    require(
        precision is not Precision.nvfp4_emulated or fp8.recipe is Fp8Config.recipe,
        f"precision=nvfp4_emulated has a recipe of its own, but fp8.recipe is {fp8.recipe.value}; leave it out.",
    )
    require(
        not config.training.compile,
        f"training.compile=true is not for precision={name}; set training.compile=false.",
    )


def _check_products(config: RunConfig) -> None:
    """The tensor cores' products take rows and columns by the multiple; Transformer Engine raises an error otherwise."""
    multiple = 32 if config.fp8.recipe is Fp8Recipe.mxfp8 else 16
    shards = config.parallel.tensor_model_parallel_size * config.parallel.context_parallel_size
    model, together = config.model, f"for precision=fp8 with fp8.recipe={config.fp8.recipe.value}"
    tensor = config.parallel.tensor_model_parallel_size
    require_divides(
        multiple * tensor, f"{multiple * tensor}, {together}", model.hidden_size, "model.hidden_size"
    )
    require(
        config.data.buckets is None,
        "data.buckets is not for precision=fp8: not every size has a number of patches that its products take; set data.buckets=null.",
    )
    for stage in stages_of(config):
        text = stage.micro_batch_size * model.text_length
        require_divides(
            multiple * shards,
            f"{multiple * shards}, {together}",
            text,
            "micro_batch_size x model.text_length",
        )
        vision = stage.micro_batch_size * (stage.sample_size // model.patch_size) ** 2
        require_divides(
            multiple * shards,
            f"{multiple * shards}, {together}",
            vision,
            "micro_batch_size x patches of an image",
        )
