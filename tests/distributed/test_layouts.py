"""A run in every layout, from the command line: the same losses, pictures and weights as on one rank.

Each run loads the checkpoint that one rank wrote after step 10, trains, validates, draws its sample grid and saves.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rmoe_megatron.checkpoint.folders import list_checkpoints
from rmoe_megatron.checkpoint.weights import RunWeights
from tests.support.commands import rmoe
from tests.support.runs import losses, make_run

TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]


@pytest.fixture(scope="module")
def one_rank_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    arguments = [
        "train",
        str(make_run(folder)),
        f"run_dir={folder}/one",
        "model.num_layers=4",
        "checkpoint.keep_last=4",
    ]
    code, errors = rmoe(*arguments)
    assert code == 0, errors
    return folder


def back_to_step_10(run: Path, run_dir: Path) -> None:
    """Copy a finished run as it was when step 10 had been saved, but for its log."""
    shutil.copytree(run, run_dir)
    shutil.rmtree(run_dir / "samples")
    for checkpoint in list_checkpoints(run_dir):
        if checkpoint.step > 10:
            shutil.rmtree(checkpoint.path)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("data-parallel", []),
        ("expert-parallel", ["parallel.expert_model_parallel_size=2"]),
        ("tensor-parallel", [*TP2, "parallel.expert_model_parallel_size=2"]),
        ("context-parallel", ["parallel.context_parallel_size=2"]),
        (
            "interleaved",
            [
                "parallel.pipeline_model_parallel_size=2",
                "parallel.virtual_pipeline_model_parallel_size=2",
            ],
        ),
        ("overlapped", ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]),
    ],
)
def test_two_ranks_go_on_as_one(one_rank_run: Path, name: str, overrides: list[str]) -> None:
    one, run_dir = one_rank_run / "one", one_rank_run / name
    back_to_step_10(one, run_dir)
    code, errors = rmoe("train", "--resume", str(run_dir), *overrides, ranks=2)
    assert code == 0, errors
    expected, actual = losses(one), losses(run_dir)
    assert len(expected) == len(actual) == 20
    assert max(abs(actual[step] - expected[step]) for step in expected) < 1e-5
    # The run learns: equal losses are not equal because nothing moves.
    assert len(set(expected.values())) == 20
    for key in ("validation_loss", "fixed_timestep_loss"):
        validation = losses(one, key)
        assert len(validation) == 2
        assert losses(run_dir, key) == pytest.approx(validation, abs=1e-5)
    pictures = [
        np.asarray(Image.open(run / "samples" / "step-00000020.png"), dtype=int) for run in (one, run_dir)
    ]
    assert abs(pictures[0] - pictures[1]).max() <= 1
    for averaged in (True, False):
        weights = [RunWeights(run, averaged=averaged).locations for run in (one, run_dir)]
        assert weights[0].keys() == weights[1].keys()
        for key, location in weights[0].items():
            expected_weight = location.read()
            difference = (weights[1][key].read() - expected_weight).norm()
            assert difference <= 1e-4 * expected_weight.norm().clamp(min=1e-2), key


def test_a_replicated_optimizer_resumes_on_another_number_of_ranks(one_rank_run: Path) -> None:
    run_dir, other = one_rank_run / "replicated", one_rank_run / "replicated-two"
    config = str(one_rank_run / "config.yaml")
    overrides = ["model.num_layers=4", "checkpoint.keep_last=4", "optimizer.distributed_optimizer=false"]
    code, errors = rmoe("train", config, f"run_dir={run_dir}", *overrides)
    assert code == 0, errors
    assert losses(run_dir) == pytest.approx(losses(one_rank_run / "one"), abs=1e-5)
    back_to_step_10(run_dir, other)
    code, errors = rmoe("train", "--resume", str(other), ranks=2)
    assert code == 0, errors
    assert losses(other) == pytest.approx(losses(run_dir), abs=1e-5)
    code, errors = rmoe("train", "--resume", str(other), "optimizer.distributed_optimizer=true")
    assert code == 2
    assert "distributed_optimizer=false" in errors
    assert "Traceback" not in errors
