"""The same run on one rank and on two: same losses, same weights."""

from pathlib import Path

import pytest

from tests.runs import losses, make_run, rmoe


@pytest.fixture(scope="module")
def one_rank_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    code, errors = rmoe("train", str(make_run(folder)), f"run_dir={folder}/one")
    assert code == 0, errors
    return folder


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("data-parallel", []),
        ("expert-parallel", ["parallel.expert_model_parallel_size=2"]),
        ("replicated-optimizer", ["optimizer.distributed_optimizer=false"]),
    ],
)
def test_two_ranks_give_the_losses_of_one(one_rank_run: Path, name: str, overrides: list[str]) -> None:
    run_dir = one_rank_run / name
    arguments = ["train", str(one_rank_run / "config.yaml"), f"run_dir={run_dir}", *overrides]
    code, errors = rmoe(*arguments, ranks=2)
    assert code == 0, errors
    expected, actual = losses(one_rank_run / "one"), losses(run_dir)
    assert len(expected) == len(actual) == 20
    assert max(abs(actual[step] - expected[step]) for step in expected) < 1e-4
    # The run learns: equal losses are not equal because nothing moves.
    assert len(set(expected.values())) == 20
    validation = losses(one_rank_run / "one", "validation_loss")
    assert losses(run_dir, "validation_loss") == pytest.approx(validation, abs=1e-4)
