"""From diffusers weights, or the original DiT's, to a run that training starts from."""

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from rmoe_megatron.checkpoint.folders import checkpoint_path, list_checkpoints
from rmoe_megatron.checkpoint.model_state import full_state
from rmoe_megatron.checkpoint.saving import new_checkpoint, save_sharded
from rmoe_megatron.config.layout_checks import check_layout
from rmoe_megatron.config.loading import save_config
from rmoe_megatron.config.model import EncodersConfig, ModelConfig, ModelDescription, Objective
from rmoe_megatron.config.run import (
    DataConfig,
    Device,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    RunConfig,
    TrainingConfig,
)
from rmoe_megatron.conversion.facebook_dit import FacebookDiT
from rmoe_megatron.conversion.origin import Origin, named, read_origin
from rmoe_megatron.conversion.pipeline_settings import STOCK_TEXT_LENGTH, read_settings, warn_of_sampler
from rmoe_megatron.conversion.sd3_file import SD3File
from rmoe_megatron.conversion.sit import SiT, looks_like_sit
from rmoe_megatron.conversion.weight_names import Copies, Rule, weight_rules
from rmoe_megatron.distributed.launch import is_main_process, world_size
from rmoe_megatron.distributed.process_groups import process_groups
from rmoe_megatron.errors import UserError
from rmoe_megatron.files.atomic import check_writable
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.model.checks import check_described_model
from rmoe_megatron.pretrained.architecture import (
    ImportedArchitecture,
    empty_transformer,
    read_architecture,
)
from rmoe_megatron.pretrained.finite import require_finite
from rmoe_megatron.pretrained.hub import is_repository, model_folder
from rmoe_megatron.pretrained.model_files import transformer_parts
from rmoe_megatron.pretrained.safetensors_folder import SafetensorsFolder, WeightSource, check_tensors
from rmoe_megatron.training.run_lock import exclusive

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def import_diffusers(
    folder: Path,
    run_dir: Path,
    text_length: int | None,
    parallel: ParallelConfig,
    progress: Progress | None = None,
) -> None:
    """Import the transformer of a diffusers folder, or of a file of Stable Diffusion 3 in its original layout.

    Args:
        folder: a pipeline's, with ``transformer/``, or the transformer's own; or the name of a repository of the hub; or the file.
        run_dir: run to create; its only checkpoint has step 0.
        text_length: text tokens of an MM-DiT, for a folder that does not say them; None takes those that it says, else the number
            that diffusers' pipeline takes by itself.
        parallel: layout of the ranks that import; the checkpoint can be loaded under any.

    Raises:
        UserError: the folder holds no model, its tensors are not those of its architecture, it says something that no run can be, or
            run_dir holds a run.
    """
    name = None  # of a repository
    if is_repository(str(folder)):
        name, folder = str(folder), model_folder(str(folder), transformer_parts)
    if folder.is_file():
        _import_sd3_file(folder, run_dir, text_length or STOCK_TEXT_LENGTH, parallel, progress)
        return
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; download the model first.")
    transformer = folder / "transformer" if (folder / "transformer").is_dir() else folder
    architecture = read_architecture(transformer, text_length or STOCK_TEXT_LENGTH)
    encoders = EncodersConfig()
    if transformer != folder:
        said = read_settings(folder, name or str(folder.resolve()), architecture.diffusion)
        if said.text_length is not None:
            if text_length not in (None, said.text_length):
                raise UserError(
                    f"--text-length {text_length} is not that of {folder}, whose model has {said.text_length} text tokens; leave it "
                    "out."
                )
            architecture = read_architecture(transformer, said.text_length)
        encoders, architecture = said.encoders, replace(architecture, diffusion=said.diffusion)
        warn_of_sampler(folder, _description(architecture, encoders))
    source = SafetensorsFolder(transformer)
    origin = read_origin(folder, name)
    _import(source, architecture, encoders, run_dir, parallel, str(transformer), progress, origin)


def _import_sd3_file(
    file: Path, run_dir: Path, text_length: int, parallel: ParallelConfig, progress: Progress | None
) -> None:
    """Import a file of Stable Diffusion 3; of what it holds besides the transformer a warning tells."""
    if file.suffix != ".safetensors":
        raise UserError(
            f"{file} is neither a folder nor a .safetensors file; from-hf takes these (from-facebook-dit takes the original DiT's "
            ".pt), and runs no pickle."
        )
    source = SD3File(file, text_length)
    if source.passed_over and is_main_process():
        logger.warning(
            "Of %s the transformer is imported; %s there are left, so name the text encoders and the autoencoder with "
            "encoders.text_encoder and encoders.autoencoder.", file, ", ".join(source.passed_over),
        )  # fmt: skip
    _import(
        source,
        source.architecture,
        EncodersConfig(),
        run_dir,
        parallel,
        str(file),
        progress,
        named(file.name),
    )


def import_facebook_dit(
    file: Path,
    run_dir: Path,
    num_attention_heads: int | None,
    parallel: ParallelConfig,
    progress: Progress | None = None,
    objective: Objective | None = None,
) -> None:
    """Import a file of the original DiT or of SiT; see :func:`import_diffusers`.

    Args:
        objective: ddpm for a DiT, rectified_flow for SiT, whose files hold the same tensors; None is for a DiT.

    Raises:
        UserError: the file holds no model, or says that it is SiT's and ``objective`` is None.
    """
    dit = FacebookDiT(file, num_attention_heads)
    if objective is None and looks_like_sit(file, dit.arguments):
        raise UserError(
            f"{file} seems to be of SiT, which has the tensors of a DiT and another objective; add --objective rectified_flow, or "
            "--objective ddpm if it is a DiT."
        )
    source = SiT(dit) if objective is Objective.rectified_flow else dit
    _import(
        source,
        source.architecture,
        EncodersConfig(),
        run_dir,
        parallel,
        str(file),
        progress,
        named(file.name),
    )


def _description(architecture: ImportedArchitecture, encoders: EncodersConfig) -> ModelDescription:
    return ModelDescription(
        model=architecture.model,
        recurrence=architecture.recurrence,
        loop=architecture.loop,
        diffusion=architecture.diffusion,
        encoders=encoders,
    )


def _import(
    source: WeightSource,
    architecture: ImportedArchitecture,
    encoders: EncodersConfig,
    run_dir: Path,
    parallel: ParallelConfig,
    where: str,
    progress: Progress | None,
    origin: Origin,
) -> None:
    if list_checkpoints(run_dir):
        raise UserError(f"{run_dir} already holds checkpoints; choose another folder.")
    check_writable(run_dir, "RUN")
    config = RunConfig(
        run_dir=str(run_dir),
        precision=Precision.fp32,
        device=Device.cpu,
        model=architecture.model,
        recurrence=architecture.recurrence,
        loop=architecture.loop,
        diffusion=architecture.diffusion,
        encoders=encoders,
        parallel=parallel,
        # An imported run is not trained; a run that starts from it has its own values.
        data=DataConfig(train=""),
        optimizer=OptimizerConfig(learning_rate=0.0),
        training=TrainingConfig(steps=0, micro_batch_size=0, global_batch_size=0),
    )
    check_described_model(config, where)
    check_layout(config, world_size())
    if parallel.virtual_pipeline_model_parallel_size > 1:
        raise UserError(
            "parallel.virtual_pipeline_model_parallel_size is for training; import with 1, the result loads under any layout."
        )
    check_tensors(source, empty_transformer(config), where)
    config.model.shared_conditioning = _shares_conditioning(source, config.model)
    with process_groups(config):
        with torch.device("meta"):
            chunks = build_chunks(config, initialise=False)
        entries = full_state(chunks)
        state = {name: entry for name, entry in entries.items() if isinstance(entry, ShardedTensor)}
        rules = weight_rules((entry.key for entry in state.values()), config.model)
        is_rank0 = dist.get_rank() == 0
        with exclusive(run_dir) if is_rank0 else nullcontext():
            for done, (name, entry) in enumerate(state.items()):
                state[name] = _filled(entry, rules[entry.key], source, where)
                if progress is not None and is_rank0:
                    progress(done + 1, len(state))
            _save(state, config, run_dir, is_rank0, origin)


def _filled(entry: ShardedTensor, rule: Rule, source: WeightSource, where: str) -> ShardedTensor:
    """Give an entry this rank's part of the source's tensors, in their own data type."""
    names = rule.names[:1] if isinstance(rule, Copies) else rule.names
    tensors = [source.read(name) for name in names]
    require_finite(zip(names, tensors, strict=True), where, "their own data type", "download the model again")
    whole = rule.join(tensors)
    part = tuple(
        slice(offset, offset + size)
        for offset, size in zip(entry.global_offset, entry.local_shape, strict=True)
    )
    data: Tensor = whole[part].clone() if whole.dim() else whole.clone()
    return replace(entry, data=data, dtype=data.dtype)


def _shares_conditioning(source: WeightSource, model: ModelConfig) -> bool:
    """Whether all blocks of a DiT have the same timestep and label embeddings."""
    if not model.is_class_conditional:
        return True
    first = "transformer_blocks.0.norm1.emb."
    for name in [name for name in source.shapes if name.startswith(first)]:
        tensor = source.read(name)
        for block in range(1, model.num_layers):
            other = name.replace("blocks.0.", f"blocks.{block}.", 1)
            if not torch.equal(tensor, source.read(other)):
                return False
    return True


def _save(
    state: Mapping[str, object], config: RunConfig, run_dir: Path, is_rank0: bool, origin: Origin
) -> None:
    with new_checkpoint(checkpoint_path(run_dir, step=0), replace=False) as partial:
        save_sharded({"model": dict(state)}, partial)
        if is_rank0:
            config = replace(config, parallel=ParallelConfig())
            save_config(config, partial / "config.yaml")
            save_config(config, run_dir / "config.yaml")
            (partial / "run_state.json").write_text(
                json.dumps({"step": 0, "samples": 0, "imported": True, **origin})
            )
