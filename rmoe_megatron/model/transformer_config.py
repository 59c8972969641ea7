"""From a run's configuration to Megatron-Core's TransformerConfig."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from rmoe_megatron.config.run import Fp8Recipe, Precision, Recompute, RunConfig
from rmoe_megatron.distributed.device import PARAMS_DTYPE
from rmoe_megatron.model.registry import adapters_of

LAYER_NORM_EPS = 1.0e-6


def fp8_settings(config: RunConfig) -> dict[str, Any]:
    """Return what Megatron-Core's FP8 context does, for Transformer Engine's layers; nothing in other precisions."""
    if config.precision is not Precision.fp8:
        return {}
    recipe, first, last = (
        config.fp8.recipe,
        config.fp8.num_layers_at_start_in_bf16,
        config.fp8.num_layers_at_end_in_bf16,
    )
    return {
        "fp8": "hybrid" if recipe in (Fp8Recipe.delayed, Fp8Recipe.tensorwise) else "e4m3",
        "fp8_recipe": recipe.value,
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": first + last > 0,
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }


def transformer_config(config: RunConfig, initialise: bool = True) -> TransformerConfig:
    """Return the TransformerConfig that hosts the model of ``config``; ``initialise`` draws initial weights."""
    model, parallel = config.model, config.parallel
    virtual, recompute = parallel.virtual_pipeline_model_parallel_size, config.training.recompute
    adapters: dict[str, Any] = {}
    for adapter, section in adapters_of(config):
        adapters |= adapter.transformer_settings(section)
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=4 * model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        layernorm_epsilon=LAYER_NORM_EPS,
        add_bias_linear=True,
        activation_func=partial(F.gelu, approximate="tanh"),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        perform_initialization=initialise,
        init_method=torch.nn.init.xavier_uniform_,
        output_layer_init_method=torch.nn.init.xavier_uniform_,
        params_dtype=PARAMS_DTYPE[config.precision],
        pipeline_dtype=PARAMS_DTYPE[config.precision],
        bf16=config.precision is not Precision.fp32,
        **fp8_settings(config),
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        # Two stages that are neighbours both ways deadlock in batched sends of the interleaved schedule.
        overlap_p2p_comm=virtual > 1,
        batch_p2p_comm=virtual == 1,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=1,  # a module lives whole on its rank
        # Whole blocks are recomputed by the blocks: Megatron-Core does it for its own TransformerLayer only.
        recompute_granularity="selective" if recompute is Recompute.selective else None,
        hetereogenous_dist_checkpoint=True,
        **adapters,
    )
