"""Whether a run fits, and what would: by made-up needs that are worked out by hand, and by those of a tiny model."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from rmoe_megatron.config.loading import load_config, save_config
from rmoe_megatron.config.run import EngineName, Recompute, RunConfig
from rmoe_megatron.errors import UserError
from rmoe_megatron.planning import plan as plan_module
from rmoe_megatron.planning import search as search_module
from rmoe_megatron.planning.dry_run import RankUsage, dry_run
from rmoe_megatron.planning.fit import check_fit
from rmoe_megatron.planning.hardware import HARDWARE, Hardware
from rmoe_megatron.planning.plan import USABLE
from tests.support.commands import rmoe
from tests.support.configurations import tiny_config
from tests.support.ranks import MMDIT
from tests.support.runs import make_run


def with_memory(memory: float) -> Hardware:
    return replace(HARDWARE["h100"], memory=memory / USABLE)


def pretend(config: RunConfig, rank: int, ranks: int, imbalance: float = 1.0) -> RankUsage:
    """100 GB of a model over the ranks that share it, and 8 GB for each sample, or 2 if they are recomputed."""
    training = config.training
    parts = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    sample = 2 if training.recompute is Recompute.full else 8
    return RankUsage(
        rank, parameters=round(40e9 / parts), gradients=round(30e9 / parts), averages=round(10e9 / parts),
        optimizer=round(20e9 / parts), activations=round(sample * training.micro_batch_size * 1e9), operations=Counter(),
        collectives=Counter(), micro_batches=2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gigabytes", "remedy"),
    [
        (131, "it fits with `training.micro_batch_size=2`"),  # 100 + 4 x 8 is too much, 100 + 2 x 8 is not
        (107, "it fits with `training.micro_batch_size=2 training.recompute=full`"),  # 100 + 2 x 2
        # Halves: 50 + 8 x 4 is too much, 50 + 8 x 2 is not.
        (
            70,
            "it fits with `training.micro_batch_size=2 parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true`",
        ),
        # Quarters, recomputed: 25 + 2; there are no larger parts of four ranks.
        (26, "the smallest layout of 4 needs 27.0 GB: take more or larger GPUs"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(
    gigabytes: float, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "dry_run", pretend)
    monkeypatch.setattr(plan_module, "dry_run", pretend)
    training = replace(tiny_config().training, micro_batch_size=4, global_batch_size=16)
    config = tiny_config(None, model=MMDIT, training=training)
    said = check_fit(config, 4, with_memory(132.5e9))
    kinds = "parameters 40.00 + gradients 30.00 + optimizer 20.00 + averages 10.00 + activations 32.00 = 132.00 GB"
    assert said == f"memory of the fullest rank: {kinds}; of the 144 GB of H100 80 GB 132.5 can be used"
    with pytest.raises(UserError) as error:
        check_fit(config, 4, with_memory(gigabytes * 1e9))
    assert kinds in str(error.value)
    assert remedy in str(error.value)


def test_the_remedy_of_a_tiny_model_fits(tmp_path: Path) -> None:
    """What is named is what `rmoe train` takes, and then the run fits."""
    training = replace(tiny_config().training, micro_batch_size=8, global_batch_size=8)
    config = tiny_config(None, training=training)
    hardware = with_memory(dry_run(config, 0, 1).peak * 0.8)
    with pytest.raises(UserError) as error:
        check_fit(config, 1, hardware)
    found = re.search(r"it fits with `([^`]+)`", str(error.value))
    assert found is not None, error.value
    save_config(config, tmp_path / "config.yaml")
    remedied = load_config(tmp_path / "config.yaml", found[1].split())
    assert check_fit(remedied, 1, hardware).startswith("memory of the fullest rank")


def test_what_the_plan_does_not_know_is_said() -> None:
    config = tiny_config(None, engine=EngineName.megatron)
    buckets = replace(
        config.data,
        buckets=load_config(Path("configs/shapes_tiny.yaml"), ["data.buckets={multiple: 8}"]).data.buckets,
    )
    said = check_fit(replace(config, data=buckets), 1, with_memory(1e9))
    assert said.startswith("memory is not counted: rmoe plan counts steps of one size of picture")


def test_the_check_counts_memory_where_a_gpu_is_named(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    command = [
        sys.executable,
        "-m",
        "rmoe_megatron",
        "train",
        str(config),
        "--check",
        "--gpu",
        "a100",
        "--ranks",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\n# memory of the fullest rank: parameters \d.* GB; of the 80 GB of A100", done.stdout)
    for words, message in (
        (["--check", "--gpu", "v100"], "--gpu v100 is not known"),
        (["--gpu", "h100"], "--gpu is for --check"),
    ):
        code, errors = rmoe("train", str(config), *words)
        assert (code, message in errors) == (2, True), errors
