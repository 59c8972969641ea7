"""What ranks find out about their data before they train."""

import os
import tarfile
from pathlib import Path

import pytest
import torch.distributed as dist

from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.errors import UserError
from rmoe_megatron.input_pipeline.batches import TrainingSource
from tests.support.ranks import run_on_ranks
from tests.support.runs import make_run


def opened(config: RunConfig) -> str:
    """What a rank hears that looks for its data in a folder of its own."""
    from rmoe_megatron.distributed.process_groups import process_groups

    with process_groups(config) as device:
        os.chdir(Path(config.run_dir).parent / str(dist.get_rank()))
        try:
            TrainingSource(config, device)
        except UserError as error:
            return str(error)
    return "all is well"


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_rank_that_sees_other_shards_is_named(is_whole: bool, tmp_path: Path) -> None:
    """A copy on the disk of one machine that lacks the last sample; every copy alone could be trained on."""
    for rank in ("0", "1"):
        config = make_run(tmp_path / rank)
    if not is_whole:
        shard = tmp_path / "1" / "data" / "train" / "train-000001.tar"
        with tarfile.open(shard) as tar:
            members = {member.name: (member, tar.extractfile(member).read()) for member in tar}  # type: ignore[union-attr]
        last = max(members).partition(".")[0]
        with tarfile.open(shard, "w") as tar:
            for name, (member, content) in members.items():
                if not name.startswith(last):
                    (tmp_path / "member").write_bytes(content)
                    tar.add(tmp_path / "member", arcname=member.name)
    overrides = [f"run_dir={tmp_path}/run", "data.train=data/train", "data.validation=data/val"]
    said = run_on_ranks(2, {"run": load_config(config, overrides)}, tmp_path, opened)["run"]
    if is_whole:
        assert said == "all is well"
        return
    assert said.startswith("Rank 1 on ")
    assert "training samples in data/train: 2 shards, 31 samples, " in said
    assert " instead of 'training samples in data/train: 2 shards, 32 samples, " in said
