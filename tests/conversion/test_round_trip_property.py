"""Any configuration, exported and imported again, is the same model and makes the same pictures, or its export is refused by name."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.config.model import ModelDescription
from rmoe_megatron.config.run import ParallelConfig, RunConfig, StageConfig, TrainingConfig
from rmoe_megatron.conversion.export import export_run
from rmoe_megatron.conversion.importing import import_diffusers
from rmoe_megatron.data.mazes.encoder import write_encoder
from rmoe_megatron.encoders.text import load_text_encoder
from rmoe_megatron.errors import UserError
from rmoe_megatron.inference.sampling import load_pipeline, sample_images
from rmoe_megatron.model.checks import check_model
from tests.conversion.descriptions import Drawn, drawn_descriptions, refusal_of, said, with_folders
from tests.conversion.test_round_trip import DESCRIPTIONS
from tests.support.configurations import tiny_config
from tests.support.runs import save_untrained
from tests.support.sd3_pipeline import make_pipeline, save_pipeline

# Shrinking a description that fails would take minutes, and it is short.
WHATEVER: dict[str, Any] = {
    "deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck),
    "phases": (Phase.explicit, Phase.reuse, Phase.generate),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Text encoders and autoencoders by the names that drawn descriptions give them."""
    folder = tmp_path_factory.mktemp("encoders")
    save_pipeline(folder / "sd3")
    write_encoder(folder / "cells", canvas=4)
    make_pipeline(shift_factor=None).vae.save_pretrained(folder / "unshifted")
    names = {"sd3": "sd3", "shifted": "sd3", "cells": "cells", "unshifted": "unshifted"}
    return {name: folder / place for name, place in names.items()}


def save_run(drawn: Drawn, folders: dict[str, Path], folder: Path) -> RunConfig:
    """Save a run of random weights, after its last stage."""
    training = TrainingConfig(steps=2, micro_batch_size=1, global_batch_size=1)
    if drawn.stage_size is not None:
        training.stages = [StageConfig(steps=2, sample_size=drawn.stage_size)]
    found = with_folders(drawn.description, folders)
    sections = {name: getattr(found, name) for name in ("model", "lora", "loop", "diffusion", "encoders")}
    config = tiny_config(found.recurrence, run_dir=str(folder), training=training, **sections)
    save_untrained(config, folder, step=2)
    return config


def images(folder: Path, description: ModelDescription) -> np.ndarray:
    prompts = ["3", "5"] if description.model.is_class_conditional else ["a cat", "two red circles"]
    return sample_images(load_pipeline(folder), prompts, [0, 1], 2, 2.0, 2)


def states_of(folder: Path) -> torch.Tensor:
    """Return the text's states [1, L, D] as the transformer of a folder gets them for a prompt."""
    pipeline, states = load_pipeline(folder), list[torch.Tensor]()
    pipeline.transformer.register_forward_pre_hook(
        lambda module, arguments, named: states.append(named["encoder_hidden_states"]), with_kwargs=True
    )
    sample_images(pipeline, ["a cat"], [0], 1, 1.0, 1)
    return states[0][:1]


def check(drawn: Drawn, folders: dict[str, Path], folder: Path) -> None:
    """Export, import, and export again."""
    description, refused = drawn.description, refusal_of(drawn)
    check_model(description)
    config = save_run(drawn, folders, folder / "run")
    if refused is not None:
        with pytest.raises(UserError) as refusal:
            export_run(folder / "run", folder / "out")
        assert refused in str(refusal.value)
        assert not (folder / "out").exists()
        return
    export_run(folder / "run", folder / "out")
    import_diffusers(folder / "out", folder / "again", None, ParallelConfig())
    again = RunWeights(folder / "again").config
    size = drawn.stage_size or description.model.sample_size
    assert said(again) == said(replace(description, model=replace(description.model, sample_size=size)))
    export_run(folder / "again", folder / "out-again")
    first, second = (images(folder / name, description) for name in ("out", "out-again"))
    assert np.array_equal(first, second)
    if not description.model.is_class_conditional:
        text = (config.model.text_length, torch.device("cpu"), config.model.text_hidden_size)
        expected = load_text_encoder(config.encoders, *text).encode(["a cat"]).hidden_states
        torch.testing.assert_close(states_of(folder / "out"), expected, atol=1e-5, rtol=1e-4)


@settings(max_examples=8, **WHATEVER)
@given(drawn=drawn_descriptions())
def test_a_run_comes_back_as_it_was_or_is_refused(drawn: Drawn, folders: dict[str, Path]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(drawn, folders, Path(folder))


@pytest.mark.distributed_full
@settings(max_examples=400, **WHATEVER)
@given(drawn=drawn_descriptions())
def test_hundreds_of_runs_come_back_as_they_were(drawn: Drawn, folders: dict[str, Path]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(drawn, folders, Path(folder))


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_named_runs_come_back_as_they_were(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    check(Drawn(DESCRIPTIONS[name], None), folders, tmp_path)
