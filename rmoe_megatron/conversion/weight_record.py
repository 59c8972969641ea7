"""What a file of exported weights says of itself, in the metadata of its safetensors header: whose they are and how they were made."""

import json
from typing import Any

from omegaconf import OmegaConf

from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.versions import versions_of

# Sections of the configuration that say how the weights came about; paths of the machine that trained are in none of them.
RECIPE = ("model", "recurrence", "lora", "loop", "diffusion", "optimizer", "training", "precision", "seed")


def weight_record(weights: RunWeights, averaged: bool) -> dict[str, str]:
    """Return the metadata of a file: run, step, which weights, code, base and recipe; safetensors holds texts alone.

    Args:
        averaged: the weights are moving averages.
    """
    config = weights.config
    record = {
        "format": "pt",  # what transformers and diffusers ask for
        "run": config.run_dir.rstrip("/").rpartition("/")[2],
        "step": str(weights.checkpoint.step),
        "weights": "moving averages" if averaged else "those of the step",
        "commit": versions_of()["rmoe-megatron"],
        "recipe": json.dumps(_recipe(config)),
    }
    if config.fine_tuning is not None:
        record["base"] = config.fine_tuning.base.rstrip("/").rpartition("/")[2]
        record["trainable"] = config.fine_tuning.trainable.value
    return record


def _recipe(config: RunConfig) -> dict[str, Any]:
    whole: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return {name: whole[name] for name in RECIPE}
