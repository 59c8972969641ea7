"""Model descriptions for property tests of exports: any that a run can have, in tiny sizes, and what a folder says of them."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from rmoe_megatron.config.model import (
    Architecture,
    DepthLoss,
    DiffusionConfig,
    EncodersConfig,
    LoopConfig,
    LoraConfig,
    ModelConfig,
    ModelDescription,
    Objective,
    Prediction,
    RecurrenceConfig,
    TimestepDensity,
)
from rmoe_megatron.data.mazes.encoder import HIDDEN_SIZE
from tests.support.sd3_pipeline import T5_WIDTH

# Of the recurrence: what is left is for training alone (temperature and weights of losses).
RECURRENCE_KEYS = ("layers", "num_modules", "steps", "rank", "modulation", "gate_inputs")
CLIP_LENGTH = 77
GATES = [
    ["tokens", "conditioning"], ["unmodulated_tokens", "conditioning"], ["tokens"], ["unmodulated_tokens"], ["conditioning"],
]  # fmt: skip


class Drawn(NamedTuple):
    """A model, whose encoders have names of :func:`with_folders`, and the size of its last stage of training, if it has stages."""

    description: ModelDescription
    stage_size: int | None


def with_folders(description: ModelDescription, folders: dict[str, Path]) -> ModelDescription:
    """Give encoders that are named by a key of ``folders`` their folders."""
    encoders = description.encoders
    named = {key: getattr(encoders, key) for key in ("text_encoder", "autoencoder")}
    found = {key: str(folders.get(name, name)) for key, name in named.items()}
    return replace(description, encoders=replace(encoders, **found))


def refusal_of(drawn: Drawn) -> str | None:
    """Return in which words an export is refused, None if it is not."""
    (description, stage_size), model = drawn, drawn.description.model
    if stage_size not in (None, model.sample_size) and model.text_on_grid:
        return "with model.text_on_grid the text's positions are those of"
    if description.encoders.text_encoder == "sd3" and 0 < model.text_length <= CLIP_LENGTH:
        return f"model.text_length is {model.text_length}, but SD3's text has 77 tokens of CLIP"
    return None


def said(description: ModelDescription) -> dict[str, Any]:
    """Return all that pictures depend on. Encoders are told by their kind: their folders are others after an export."""
    model, diffusion, recurrence = description.model, description.diffusion, description.recurrence
    is_flow = diffusion.objective is Objective.rectified_flow
    encoders = description.encoders
    return {
        "model": {each.name: getattr(model, each.name) for each in fields(model) if each.name != "preset"},
        "recurrence": recurrence and {key: getattr(recurrence, key) for key in RECURRENCE_KEYS},
        "loop": description.loop,
        "lora": None,  # it is part of the weights afterwards
        "objective": diffusion.objective,
        "flow": is_flow and (diffusion.shift, diffusion.shift_base_size, diffusion.prediction),
        "minilm": not model.is_class_conditional and encoders.text_encoder == "minilm",
        "dropped": sorted(encoders.dropped),
        "pixels": encoders.autoencoder == "pixel",
    }


@st.composite
def drawn_descriptions(draw: st.DrawFn) -> Drawn:
    """Draw a description that :func:`rmoe_megatron.model.checks.check_model` lets pass."""
    return draw(_mmdits()) if draw(st.integers(0, 9)) < 7 else draw(_dits())


@st.composite
def _mmdits(draw: st.DrawFn) -> Drawn:
    model = draw(_sizes())
    encoders, text = draw(_text_encoders()), {}
    autoencoder = draw(st.sampled_from(["pixel", "shifted", "unshifted"]))
    encoders = replace(encoders, autoencoder=autoencoder)
    patches = model.sample_size // model.patch_size
    text["text_hidden_size"], text["pooled_size"] = {
        "sd3": (T5_WIDTH, 28), "minilm": (384, 384), "cells": (HIDDEN_SIZE, HIDDEN_SIZE),
    }[encoders.text_encoder]  # fmt: skip
    lengths = [333, CLIP_LENGTH + 6, CLIP_LENGTH] if encoders.text_encoder == "sd3" else [1, 7, 17]
    text["text_length"] = draw(st.sampled_from(lengths))
    has_second = draw(st.integers(0, 3)) == 0
    second = draw(_blocks(model.num_layers)) if has_second else []
    rope_theta = None if has_second else draw(st.sampled_from([None, 100.0, 10000.0]))
    on_grid = rope_theta is not None and text["text_length"] >= patches**2 and draw(st.booleans())
    model = replace(
        model,
        **text,
        in_channels=3 if autoencoder == "pixel" else 4,
        qk_norm=draw(st.booleans()),
        pos_embed_max_size=patches + draw(st.integers(0, 3)),
        dual_attention_layers=second,
        rope_theta=rope_theta,
        text_on_grid=on_grid,
        exclusive_attention=not has_second and draw(st.booleans()),
    )
    recurrence, lora = draw(_adapters(model.num_layers))
    loop = draw(_loops(model.num_layers))
    diffusion = draw(_diffusions(recurrence is not None, loop, can_predict_samples=True))
    largest = model.pos_embed_max_size * model.patch_size
    sizes = [None, *(size for size in (4, 8, 12) if size <= largest and size % model.patch_size == 0)]
    return Drawn(
        ModelDescription(model, recurrence, lora, loop, diffusion, encoders), draw(st.sampled_from(sizes))
    )


@st.composite
def _dits(draw: st.DrawFn) -> Drawn:
    model = draw(_sizes())
    recurrence, lora = draw(_adapters(model.num_layers))
    diffusion = draw(_diffusions(has_recurrence=False, loop=None, can_predict_samples=False))
    autoencoder = draw(st.sampled_from(["pixel", "shifted", "unshifted"]))
    model = replace(
        model,
        architecture=Architecture.dit,
        in_channels=3 if autoencoder == "pixel" else 4,
        qk_norm=False,
        num_classes=draw(st.sampled_from([7, 1000])),
        learned_sigma=diffusion.objective is Objective.ddpm and draw(st.booleans()),
        mlp_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        downscale_freq_shift=draw(st.sampled_from([0.0, 1.0])),
        timestep_scale=draw(st.sampled_from([1.0, 0.001])),
        shared_conditioning=draw(st.booleans()),
    )
    encoders = EncodersConfig(autoencoder=autoencoder)
    return Drawn(ModelDescription(model, recurrence, lora, None, diffusion, encoders), None)


@st.composite
def _sizes(draw: st.DrawFn) -> ModelConfig:
    return ModelConfig(
        sample_size=draw(st.sampled_from([4, 8])),
        patch_size=draw(st.sampled_from([2, 4])),
        in_channels=3,
        num_layers=draw(st.integers(2, 3)),
        hidden_size=32,
        num_attention_heads=draw(st.sampled_from([1, 2])),
    )


@st.composite
def _text_encoders(draw: st.DrawFn) -> EncodersConfig:
    name = draw(st.sampled_from(["sd3", "sd3", "cells", "cells", "minilm"]))
    dropped = draw(st.lists(st.sampled_from(["clip_l", "clip_g", "t5"]), unique=True, max_size=2))
    return EncodersConfig(text_encoder=name, dropped=dropped if name == "sd3" else [])


def _blocks(num_layers: int) -> st.SearchStrategy[list[int]]:
    numbers = st.lists(st.integers(0, num_layers - 1), unique=True, min_size=1, max_size=num_layers)
    return numbers.map(sorted)


@st.composite
def _adapters(draw: st.DrawFn, num_layers: int) -> tuple[RecurrenceConfig | None, LoraConfig | None]:
    kind, layers = draw(st.sampled_from(["recurrence", "recurrence", "lora", "none"])), _blocks(num_layers)
    if kind == "lora":
        return None, LoraConfig(draw(layers), draw(st.integers(1, 4)))
    if kind == "none":
        return None, None
    recurrence = RecurrenceConfig(
        layers=draw(layers),
        num_modules=draw(st.integers(1, 4)),
        steps=draw(st.integers(1, 3)),
        rank=draw(st.sampled_from([None, 1, 4])),
        tau=draw(st.sampled_from([5.0, 0.5])),
        modulation=draw(st.booleans()),
        gate_inputs=draw(st.sampled_from(GATES)),
        up_init_std=0.1,
        aux_loss_coeff=draw(st.sampled_from([0.0, 0.01])),
    )
    return recurrence, None


@st.composite
def _loops(draw: st.DrawFn, num_layers: int) -> LoopConfig | None:
    if draw(st.booleans()):
        return None
    first = draw(st.integers(0, num_layers - 2))
    last = draw(st.integers(first, num_layers - 2))
    return LoopConfig(first, last, draw(st.integers(1, 3)), draw(st.booleans()))


@st.composite
def _diffusions(
    draw: st.DrawFn, has_recurrence: bool, loop: LoopConfig | None, can_predict_samples: bool
) -> DiffusionConfig:
    losses = [DepthLoss.last]
    losses += [DepthLoss.every] if has_recurrence or loop is not None else []
    losses += [DepthLoss.drawn] if loop is not None and loop.times > 1 else []
    trained = {
        "guidance_dropout": draw(st.sampled_from([0.1, 0.0])),
        "depth_loss": draw(st.sampled_from(losses)),
        "distillation": draw(st.sampled_from([0.5, 0.0])),
    }
    if draw(st.integers(0, 3)) == 0:
        return DiffusionConfig(
            objective=Objective.ddpm, min_snr_gamma=draw(st.sampled_from([None, 5.0])), **trained
        )
    predictions = list(Prediction) if can_predict_samples else [Prediction.velocity]
    return DiffusionConfig(
        shift=draw(st.sampled_from([1.0, 3.0, 0.3])),
        shift_base_size=draw(st.sampled_from([None, 4, 16])),
        prediction=draw(st.sampled_from(predictions)),
        timestep_density=draw(st.sampled_from(TimestepDensity)),
        **trained,
    )
