"""What a run reads and writes: samples by hand, checkpoints against one that is saved."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rmoe_megatron.checkpoint.folders import list_checkpoints
from rmoe_megatron.checkpoint.run_checkpoint import Progress, save_checkpoint
from rmoe_megatron.config.run import Latents, Precision, PrecomputeConfig
from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.engine.megatron.engine import MegatronEngine
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.planning.costs import checkpoint_bytes, sample_bytes
from rmoe_megatron.training.ema import ExponentialMovingAverage
from rmoe_megatron.training.state import TrainingState
from tests.planning.test_dry_run import LARGER
from tests.support.configurations import one_rank, tiny_config
from tests.support.ranks import DIT, conditions


def test_bytes_of_a_sample() -> None:
    """Latents 3 x 16 x 16, 16 tokens of 64 values and 64 pooled ones, two bytes each; of a distribution twice the latents."""
    config = tiny_config(model=LARGER)
    assert sample_bytes(config) == 2 * (768 + 1024 + 64)
    stored = PrecomputeConfig(latents=Latents.distribution)
    distribution = replace(config, data=replace(config.data, precompute=stored))
    assert sample_bytes(distribution) == 2 * (2 * 768 + 1024 + 64)
    assert sample_bytes(tiny_config(None, model=DIT)) == 2 * 3 * 8 * 8
    pictures = replace(config, data=replace(config.data, precompute=PrecomputeConfig(latents=Latents.none)))
    assert sample_bytes(pictures) is None


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16])
def test_bytes_of_a_checkpoint(precision: Precision, tmp_path: Path) -> None:
    config = tiny_config(model=LARGER, precision=precision)
    planned = checkpoint_bytes(config)
    with one_rank(config):
        null: Any = conditions(config, torch.zeros(1))
        engine = MegatronEngine(config, build_chunks(config), DiffusionLoss(config, config.seed, null))
        averages = ExponentialMovingAverage(engine.parameters, 0.9, main_weights=engine.main_weights)
        save_checkpoint(TrainingState(engine, averages, Progress()), config, tmp_path)
    (folder,) = list_checkpoints(tmp_path)
    written = sum(file.stat().st_size for file in folder.path.rglob("*.distcp"))
    assert planned == pytest.approx(written, rel=0.03)
