"""A rank whose shard of the optimizer is padding only: the run is saved and goes on."""

from pathlib import Path

import torch

from rmoe_megatron.config.run import RunConfig
from tests.support.ranks import MMDIT, batches, conditions, configuration, run_on_ranks

TRAINED = "proj_out.bias"  # 12 numbers of a bucket of 128: the second rank's half holds none


def resumed(config: RunConfig) -> tuple[int, list[float]]:
    """How many numbers rank 0 has in its shard, and the trained bias after two steps, a checkpoint, and one step more."""
    import tempfile

    import torch.distributed as dist

    from rmoe_megatron.checkpoint.folders import list_checkpoints
    from rmoe_megatron.checkpoint.run_checkpoint import Progress, load_checkpoint, save_checkpoint
    from rmoe_megatron.diffusion.loss import DiffusionLoss
    from rmoe_megatron.distributed.process_groups import process_groups
    from rmoe_megatron.engine.registry import build_engine
    from rmoe_megatron.model.build import build_chunks
    from rmoe_megatron.training.ema import ExponentialMovingAverage
    from rmoe_megatron.training.state import TrainingState

    with process_groups(config) as device:
        folders = [tempfile.mkdtemp()]
        dist.broadcast_object_list(folders)
        folder, steps = Path(folders[0]), list(batches(config))
        for part, micro_batches in ((0, steps[:2]), (1, steps[2:3])):
            modules = build_chunks(config).to(device)
            for name, parameter in modules.named_parameters():
                parameter.requires_grad_(name.endswith(TRAINED))
            null = conditions(config, torch.zeros(1)).map(torch.zeros_like)
            engine = build_engine(config, modules, DiffusionLoss(config, 0, null))
            ema = ExponentialMovingAverage(engine.parameters, 0.9, main_weights=engine.main_weights)
            state = TrainingState(engine, ema, Progress(step=2))
            if part:
                load_checkpoint(state, list_checkpoints(folder)[0])
            for each in micro_batches:
                engine.step(each)
            if not part:
                save_checkpoint(state, config, folder)
        held = sum(each.numel() for group in engine.optimizer.param_groups for each in group["params"])
        (bias,) = engine.parameters.values()
        return held, bias.tolist()


def test_a_shard_of_padding_only_is_saved_and_resumed(tmp_path: Path) -> None:
    config = configuration(MMDIT, recurrent=False)
    (_, expected), (held, found) = (
        run_on_ranks(ranks, {"run": config}, tmp_path, resumed)["run"] for ranks in (1, 2)
    )
    assert held == len(expected) == 12  # all of it on rank 0
    assert max(map(abs, expected)) > 0
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-7)
