"""What the comments of shipped configurations say of memory is what a plan says, and it is there."""

import re
from pathlib import Path

import pytest

from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.planning.dry_run import dry_run
from rmoe_megatron.planning.hardware import HARDWARE
from rmoe_megatron.planning.plan import USABLE
from rmoe_megatron.planning.shallow import two_depths

CONFIGS = Path(__file__).parents[2] / "configs"
COMMENT = re.compile(r"^# Memory: ([\d.]+) of the ([\d.]+) GB .* of (\d+) H100", re.MULTILINE)


def said(name: str) -> tuple[float, float, int]:
    """Return GB of the fullest rank, GB that can be used, and the number of GPUs."""
    text = (CONFIGS / f"{name}.yaml").read_text()
    found = COMMENT.search(text)
    assert found is not None, name
    return float(found[1]), float(found[2]), int(found[3])


def planned(config: RunConfig, ranks: int) -> float:
    """Return GB of the first rank, of two shallow plans where that spares something."""
    depths = two_depths(config)
    if depths is None:
        return dry_run(config, 0, ranks).peak / 1e9
    return depths.whole(*(dry_run(each, 0, ranks).peak / 1e9 for each in (depths.first, depths.second)))


def check(name: str) -> None:
    gigabytes, usable, ranks = said(name)
    assert usable == pytest.approx(USABLE * HARDWARE["h100"].memory / 1e9, abs=0.05)
    config = load_config(CONFIGS / f"{name}.yaml", [])
    assert planned(config, ranks) == pytest.approx(gigabytes, rel=0.01)
    assert gigabytes <= usable


@pytest.mark.parametrize("name", ["t2i_2b", "t2i_8b_moe"])
def test_pretraining_fits_as_its_comment_says(name: str) -> None:
    check(name)


@pytest.mark.distributed_full  # each plans a whole model of 24 or 28 blocks
@pytest.mark.parametrize("name", ["imagenet_dit_xl_2", "dit_xl2_recurrent", "sd3_medium_recurrent"])
def test_other_runs_fit_as_their_comments_say(name: str) -> None:
    check(name)
