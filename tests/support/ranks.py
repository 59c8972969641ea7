"""Several ranks on this machine that train tiny models from random weights, and report them whole."""

import gc
import math
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from rmoe_megatron.config.layout_checks import check_layout
from rmoe_megatron.config.model import Architecture, ModelConfig
from rmoe_megatron.config.run import ParallelConfig, RunConfig
from rmoe_megatron.counter_rng import normal, sample_keys, uniform
from rmoe_megatron.data.batch import Batch, ClassConditions, Conditions, TextConditions
from tests.support.commands import PRELOADED
from tests.support.configurations import MODEL, RECURRENCE, tiny_config

# Ranks are forked from a server that has imported everything and run nothing: a fork of this process, whose threads and
# communication state may be anything by now, can hang.
multiprocessing.set_forkserver_preload(PRELOADED)

STEPS = 10
TIMEOUT = 600

# Six tokens of text are padded by two under TP4; the last block has no text output.
MMDIT = replace(MODEL, num_layers=4, num_attention_heads=4, text_length=6, dual_attention_layers=[0])
DIT = ModelConfig(
    architecture=Architecture.dit, sample_size=8, patch_size=2, in_channels=3, num_layers=4, hidden_size=32,
    num_attention_heads=4, qk_norm=False, num_classes=7,
)  # fmt: skip
RECURRENT = replace(RECURRENCE, layers=[1, 2], steps=3, z_loss_coeff=0.01)


@dataclass
class Result:
    """What a run did: per step the loss and the gradient's norm, and the whole model's tensors by name."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    initial: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step, before clipping
    final: dict[str, Tensor] = field(default_factory=dict)
    averages: dict[str, Tensor] = field(default_factory=dict)
    validation_loss: float = 0.0
    denoised: list[Tensor] = field(default_factory=list)


def configuration(model: ModelConfig, recurrent: bool, **changes: Any) -> RunConfig:
    """A tiny run with four micro-batches of two samples per step on one rank; clipping is active."""
    config = tiny_config(RECURRENT if recurrent else None, model=model)
    # Gradients that are zero but for rounding (of the keys' biases) would move weights by the learning rate.
    config.optimizer = replace(config.optimizer, eps=1e-6, warmup_steps=0, clip_grad=0.05, weight_decay=0.01)
    training = replace(config.training, micro_batch_size=2, global_batch_size=8)
    return replace(config, **{"training": training, **changes})


def layout(**sizes: Any) -> ParallelConfig:
    """Sizes by their usual short names (tp, cp, pp, vpp, ep), other settings by their own."""
    names = {
        "tp": "tensor_model_parallel_size", "cp": "context_parallel_size", "pp": "pipeline_model_parallel_size",
        "vpp": "virtual_pipeline_model_parallel_size", "ep": "expert_model_parallel_size",
    }  # fmt: skip
    settings = {names.get(name, name): value for name, value in sizes.items()}
    return ParallelConfig(sequence_parallel=sizes.get("tp", 1) > 1, **settings)


def run_on_ranks(
    ranks: int, cases: dict[str, RunConfig], folder: Path, job: Callable[[RunConfig], Any] | None = None
) -> dict[str, Any]:
    """Do a job with every configuration on ``ranks`` ranks, one after the other; a time-out kills the ranks.

    Args:
        job: returns what rank 0 reports; :func:`train` if not given.
    """
    for config in cases.values():
        check_layout(config, ranks)
    # As torchrun's agent does, this process holds the stores: each case a new one, no port taken twice.
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in cases]
    arguments = (ranks, job or train, list(cases.values()), [store.port for store in stores], folder)
    started = multiprocessing.start_processes(
        _rank_main, arguments, nprocs=ranks, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + TIMEOUT
    try:
        while not started.join(timeout=5):
            assert time.monotonic() < deadline, f"{ranks} ranks took longer than {TIMEOUT} s"
    finally:
        for process in started.processes:
            process.kill()
    return dict(zip(cases, torch.load(folder / "results.pt", weights_only=False), strict=True))


def _rank_main(
    rank: int,
    ranks: int,
    job: Callable[[RunConfig], Any],
    configs: list[RunConfig],
    ports: list[int],
    folder: Path,
) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays: checkpoints collect garbage several times, half a second each with it
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    results = []
    for port, config in zip(ports, configs, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        results.append(job(config))
    if rank == 0:
        torch.save(results, folder / "results.pt")


def train(config: RunConfig, gradients: bool = True, resumes: bool = False) -> Result:
    """Take ``STEPS`` optimizer steps from weights that are all different from zero.

    Args:
        gradients: those of the first step are reported.
        resumes: after half of the steps the run is saved, thrown away, built anew from other weights and loaded.
    """
    from rmoe_megatron.diffusion.loss import DiffusionLoss
    from rmoe_megatron.distributed.process_groups import process_groups
    from rmoe_megatron.engine.registry import build_engine
    from rmoe_megatron.model.build import build_chunks
    from rmoe_megatron.training.ema import ExponentialMovingAverage

    result = Result()
    with process_groups(config) as device:
        modules = build_chunks(config).to(device)
        null = conditions(config, torch.zeros(1)).map(torch.zeros_like)
        places = places_of(modules)
        result.initial = gathered(places, dict(modules.named_parameters()))
        perturb(modules)
        engine = build_engine(config, modules, DiffusionLoss(config, config.seed, null))
        ema = ExponentialMovingAverage(engine.parameters, 0.9, main_weights=engine.main_weights)
        for number, micro_batches in enumerate(batches(config)):
            is_resumed = resumes and number == STEPS // 2
            if is_resumed:
                engine.gather_parameters()
                ema.update(number - 1)
                engine, ema, places = saved_and_resumed(engine, ema, config)

            def before_update(
                number: int = number,
                engine: Any = engine,
                places: Any = places,
                ema: Any = None if is_resumed or number == 0 else ema,
            ) -> None:
                if number == 0 and gradients:
                    result.gradients = gathered(places, whole_gradients(engine))
                if ema is not None:
                    ema.update(number - 1)

            outcome = engine.step(micro_batches, before_update)
            result.losses.append(outcome.loss)
            result.grad_norms.append(outcome.grad_norm)
        engine.gather_parameters()
        ema.update(STEPS - 1)
        ema.complete()
        result.final = gathered(places, whole(engine, engine.parameters))
        result.averages = gathered(places, whole(engine, ema.averages))
        result.validation_loss = engine.evaluate(next(batches(config)))
        keys = sample_keys(4, torch.arange(3))
        for shape in sizes(config):
            latents = normal(keys, config.model.in_channels * math.prod(shape)).view(3, -1, *shape)
            timestep = torch.tensor([10.0, 500.0, 900.0])
            denoised = engine.denoise(latents, timestep, keys, conditions(config, torch.arange(3)))
            result.denoised.append(denoised)
    return result


def saved_and_resumed(engine: Any, ema: Any, config: RunConfig) -> tuple[Any, Any, Any]:
    """Save a run and load it into one of other weights; returns its engine, averages and places."""
    from rmoe_megatron.checkpoint.folders import list_checkpoints
    from rmoe_megatron.checkpoint.run_checkpoint import Progress, load_checkpoint, save_checkpoint
    from rmoe_megatron.engine.registry import build_engine
    from rmoe_megatron.model.build import build_chunks
    from rmoe_megatron.training.ema import ExponentialMovingAverage
    from rmoe_megatron.training.state import TrainingState

    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    folder = Path(folders[0])
    save_checkpoint(TrainingState(engine, ema, Progress(step=STEPS // 2)), config, folder)
    modules = build_chunks(replace(config, seed=config.seed + 1)).to(engine.device)
    places = places_of(modules)  # before ZeRO's third stage takes the parameters away
    engine = build_engine(config, modules, engine.loss)
    ema = ExponentialMovingAverage(engine.parameters, ema.decay, main_weights=engine.main_weights)
    (checkpoint,) = list_checkpoints(folder)
    progress = Progress()
    load_checkpoint(TrainingState(engine, ema, progress), checkpoint)
    assert progress.step == STEPS // 2
    dist.barrier()
    shutil.rmtree(folder, ignore_errors=True)
    return engine, ema, places


def conditions(config: RunConfig, draws: Tensor) -> Conditions:
    """Text or labels of the given draws."""
    model, keys = config.model, sample_keys(1, draws)
    if model.architecture is Architecture.dit:
        return ClassConditions((uniform(keys, 1)[:, 0] * model.num_classes).long())
    text = normal(keys, model.text_length * model.text_hidden_size)
    return TextConditions(
        text.view(-1, model.text_length, model.text_hidden_size),
        normal(sample_keys(2, draws), model.pooled_size),
    )


def sizes(config: RunConfig) -> list[tuple[int, int]]:
    """Heights and widths of latents that the steps take in turn: a DiT's are square."""
    side = config.model.sample_size
    return (
        [(side, side)]
        if config.model.is_class_conditional
        else [(side, side), (side // 2, side), (side, side // 2)]
    )


def batches(config: RunConfig) -> Iterator[list[Batch]]:
    """This rank's micro-batches of each step, each sample a function of its draw number."""
    from megatron.core import parallel_state

    from rmoe_megatron.data.loader import BatchLayout

    training, model = config.training, config.model
    batch_layout = BatchLayout(
        training.global_batch_size,
        training.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    for step in range(STEPS):
        micro_batches = []
        for micro_batch in batch_layout.micro_batches(step * training.global_batch_size):
            draws = torch.tensor(list(micro_batch))
            size = (model.in_channels, *sizes(config)[step % len(sizes(config))])
            latents = normal(sample_keys(3, draws), math.prod(size)).view(-1, *size)
            micro_batches.append(Batch(latents, conditions(config, draws), draws))
        yield micro_batches


def perturb(chunks: torch.nn.ModuleList, std: float = 0.05) -> None:
    """Add numbers to every weight that depend on its name and place in the whole model only."""
    parameters = dict(chunks.named_parameters())
    for name, (key, place, shape) in places_of(chunks).items():
        if not key.endswith("pos_embed.pos_embed"):
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            whole = torch.randn(shape, generator=generator) * std
            with torch.no_grad():
                parameters[name].add_(whole[place].view_as(parameters[name]))


def places_of(chunks: torch.nn.ModuleList) -> dict[str, tuple[str, Any, Any]]:
    """Of this rank's parameters by name: key, place in the whole model's tensor, and its shape."""
    from megatron.core.dist_checkpointing import ShardedTensor

    from rmoe_megatron.checkpoint.model_state import full_state

    trained = {name for name, _ in chunks.named_parameters()}
    return {
        name: (entry.key, entry.global_slice(), entry.global_shape)
        for name, entry in full_state(chunks).items()
        if isinstance(entry, ShardedTensor) and name in trained
    }


def whole_gradients(engine: Any) -> dict[str, Tensor]:
    """This rank's gradients, put together again where an optimizer has sharded them over data-parallel ranks."""
    if hasattr(engine, "deepspeed"):
        # Not safe_get_full_grad, which takes what autograd has left of a rank's own gradient, if there is any.
        return {
            name: each._z3_optimizer.get_fp32_grad_for_param(each)
            if hasattr(each, "_z3_optimizer")
            else each.get_full_hp_grad()
            for name, each in engine.modules.named_parameters()
        }
    for chunk in engine.model.wrapped:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            group = buffer.data_parallel_group
            if not chunk.ddp_config.use_distributed_optimizer or group.size() == 1:
                continue
            for bucket in buffer.buckets:
                mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)
    return {name: parameter.main_grad for name, parameter in engine.modules.named_parameters()}


def whole(engine: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's parameters, or their averages, put together again where ZeRO's third stage has cut them flat."""
    shapes = {name: getattr(each, "ds_shape", None) for name, each in engine.modules.named_parameters()}
    found = {}
    for name, value in values.items():
        shape = shapes[name]
        if shape is not None:
            parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, value.detach().contiguous())
            value = torch.cat(parts)[: math.prod(shape)].view(shape)
        found[name] = value
    return found


def gathered(places: dict[str, tuple[str, Any, Any]], values: dict[str, Tensor]) -> dict[str, Tensor]:
    """On rank 0 the whole model's tensors in float32, put together from all ranks; replicas must be equal."""
    mine = [
        (key, place, shape, values[name].detach().float().clone())
        for name, (key, place, shape) in places.items()
    ]
    is_rank0 = dist.get_rank() == 0
    everyone: list[Any] | None = [None] * dist.get_world_size() if is_rank0 else None
    dist.gather_object(mine, everyone)
    whole: dict[str, Tensor] = {}
    for key, place, shape, data in (part for parts in everyone or [] for part in parts):
        tensor = whole.setdefault(key, torch.full(shape, torch.nan))
        before = tensor[place].clone()
        tensor[place] = data.view_as(before)
        if not before.isnan().all():
            torch.testing.assert_close(
                before, tensor[place], rtol=1e-6, atol=1e-8, msg=f"replicas of {key} differ"
            )
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole
