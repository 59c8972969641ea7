"""Real training runs for tests: tiny shards and a tiny configuration file; tests/support/commands.py starts them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from rmoe_megatron.config.run import RunConfig
from tests.support.configurations import one_rank, randomise

CONFIG = """\
run_dir: {folder}/run
device: cpu
model: {{sample_size: 8, patch_size: 2, in_channels: 3, num_layers: 3, hidden_size: 32, num_attention_heads: 2,
         text_length: 6, text_hidden_size: 384, pooled_size: 384, pos_embed_max_size: 4}}
recurrence: {{layers: [1, 2], num_modules: 4, steps: 2, rank: 4, up_init_std: 0.1, aux_loss_coeff: 0.01}}
data: {{train: {folder}/data/train, validation: {folder}/data/val}}
optimizer: {{learning_rate: 1.0e-3, warmup_steps: 2, ema_decay: 0.9}}
training: {{steps: 20, micro_batch_size: 4, global_batch_size: 8, log_every: 1, validate_every: 10,
            validation_samples: 16, sample_every: 20, sample_steps: 2, sample_prompts: [a red circle]}}
checkpoint: {{every: 5}}
"""


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> None:
    """Write samples (extension -> content) as a WebDataset shard."""
    members = [
        (f"{number:06d}.{extension}", content)
        for number, sample in enumerate(samples)
        for extension, content in sample.items()
    ]
    write_members(path, members)


def write_members(path: Path, members: list[tuple[str, bytes]]) -> None:
    """Write an archive of these members in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def array(values: np.ndarray) -> bytes:
    """An array as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, values.astype(np.float16))
    return buffer.getvalue()


def make_run(folder: Path, side: int = 8) -> Path:
    """Write precomputed shards and a configuration below ``folder``; returns the configuration's path."""
    rng = np.random.default_rng(0)
    for split, shards in (("train", 2), ("val", 1)):
        for shard in range(shards):
            samples = [
                {
                    "latents.npy": array(rng.standard_normal((3, side, side))),
                    "text_hidden_states.npy": array(rng.standard_normal((6, 384))),
                    "text_pooled.npy": array(rng.standard_normal(384)),
                }
                for _ in range(16)
            ]
            write_shard(folder / "data" / split / f"{split}-{shard:06d}.tar", samples)
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(folder=folder))
    return config


def losses(run_dir: Path, key: str = "loss") -> dict[int, float]:
    """Return a metric by step from a run's JSONL file."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record[key] for record in records if key in record}


def assert_same_picture(path: Path, other: Path) -> None:
    """Assert that two pictures are the same but for values on the edge between two levels of 255, which the last bit decides."""
    one, two = (np.asarray(Image.open(each).convert("RGB")).astype(int) for each in (path, other))
    assert one.shape == two.shape
    assert np.abs(one - two).max() <= 1
    assert (one != two).mean() < 0.01


def save_untrained(config: RunConfig, folder: Path, step: int = 0) -> None:
    """Save a run of random weights with one checkpoint, as an import does."""
    from megatron.core.dist_checkpointing import ShardedTensor

    from rmoe_megatron.checkpoint.folders import checkpoint_path
    from rmoe_megatron.checkpoint.model_state import full_state
    from rmoe_megatron.checkpoint.saving import new_checkpoint, save_sharded
    from rmoe_megatron.config.loading import save_config
    from rmoe_megatron.model.build import build_chunks

    folder.mkdir(parents=True, exist_ok=True)
    with one_rank(config):
        chunks = build_chunks(config, initialise=True)
        for chunk in chunks:
            randomise(chunk, std=0.1)
        entries = full_state(chunks)
        state = {name: entry for name, entry in entries.items() if isinstance(entry, ShardedTensor)}
        with new_checkpoint(checkpoint_path(folder, step=step)) as partial:
            save_sharded({"model": state}, partial)
            save_config(config, partial / "config.yaml")
            save_config(config, folder / "config.yaml")
            (partial / "run_state.json").write_text(
                json.dumps({"step": step, "samples": 0, "imported": True})
            )
