"""Real training runs for tests: tiny shards, a tiny configuration file, and processes with a time-out."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import psutil

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
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for extension, content in sample.items():
                header = tarfile.TarInfo(f"{number:06d}.{extension}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))


def array(values: np.ndarray) -> bytes:
    """An array as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, values.astype(np.float16))
    return buffer.getvalue()


def make_run(folder: Path) -> Path:
    """Write precomputed shards and a configuration below ``folder``; returns the configuration's path."""
    rng = np.random.default_rng(0)
    for split, shards in (("train", 2), ("val", 1)):
        for shard in range(shards):
            samples = [
                {
                    "latents.npy": array(rng.standard_normal((3, 8, 8))),
                    "text_hidden_states.npy": array(rng.standard_normal((6, 384))),
                    "text_pooled.npy": array(rng.standard_normal(384)),
                }
                for _ in range(16)
            ]
            write_shard(folder / "data" / split / f"{split}-{shard:06d}.tar", samples)
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(folder=folder))
    return config


def start(arguments: list[str], ranks: int = 1) -> subprocess.Popen[str]:
    """Start ``rmoe`` with ``arguments`` in a process group of its own, under torchrun for several ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*launcher, "-m", "rmoe_megatron", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str]:
    """Wait for a process; returns exit code and standard error. A time-out kills the whole group."""
    try:
        _, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return process.returncode, errors


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 the process and its children."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def session_processes(session: int) -> list[str]:
    """Return the command lines of the processes that still run in a session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())}")
    return found


def rmoe(*arguments: str, ranks: int = 1) -> tuple[int, str]:
    """Run ``rmoe`` to its end; returns exit code and standard error."""
    return finish(start(list(arguments), ranks))


def losses(run_dir: Path, key: str = "loss") -> dict[int, float]:
    """Return a metric by step from a run's JSONL file."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record[key] for record in records if key in record}
