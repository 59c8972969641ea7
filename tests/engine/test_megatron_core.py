"""What a change of Megatron-Core's version must not break: old checkpoints, machines without Triton, a quiet start."""

import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.support.commands import finish, rmoe, start_fresh
from tests.support.runs import losses, make_run, write_shard

# A run of six steps of Megatron-Core 0.16.1 on Python 3.11, its checkpoint after the third, and what followed there.
OLD_CHECKPOINT = Path(__file__).parent / "checkpoints" / "megatron_core_0_16_1.tar.gz"
OLD_LOSSES = {4: 2.058286190032959, 5: 1.936600923538208, 6: 2.040809392929077}
OLD_VALIDATION_LOSS = {6: 1.994152545928955}


def write_as_drawn(folder: Path) -> Path:
    """Write the training samples again in the order in which the run drew them in two epochs."""
    samples = []
    for shard in sorted((folder / "data" / "train").glob("*.tar")):
        with tarfile.open(shard) as tar:
            contents = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
        keys = sorted({name.partition(".")[0] for name, _ in contents})
        samples += [
            {name.partition(".")[2]: content for name, content in contents if name.startswith(key)}
            for key in keys
        ]
    drawn = [number for epoch in (0, 1) for number in np.random.default_rng([0, epoch]).permutation(32)]
    write_shard(folder / "data" / "drawn" / "a.tar", [samples[number] for number in drawn])
    return folder / "data" / "drawn"


def test_a_run_of_the_old_core_goes_on(tmp_path: Path) -> None:
    make_run(tmp_path)
    with tarfile.open(OLD_CHECKPOINT) as tar:
        tar.extractall(tmp_path / "run", filter="data")
    train, validation = write_as_drawn(tmp_path), tmp_path / "data" / "val"
    data = ["data.shuffle=false", f"data.train={train}", f"data.validation={validation}"]
    code, errors = rmoe("train", "--resume", str(tmp_path / "run"), *data)
    assert code == 0, errors
    assert losses(tmp_path / "run") == pytest.approx(OLD_LOSSES, abs=1e-6)
    assert losses(tmp_path / "run", "validation_loss") == pytest.approx(OLD_VALIDATION_LOSS, abs=1e-6)


def test_megatron_core_is_imported_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import rmoe_megatron.training.run\n"
        "from megatron.core.pipeline_parallel import schedules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=240)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["engine=deepspeed"],
        pytest.param(
            ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
            marks=pytest.mark.distributed_full,
        ),
    ],
)
def test_a_run_says_nothing_but_its_layers_and_its_progress(tmp_path: Path, overrides: list[str]) -> None:
    short = ["training.steps=3", "optimizer.warmup_steps=1"]
    command = ["train", str(make_run(tmp_path)), *short, *overrides]
    code, errors = finish(start_fresh(command, ranks=2 if "parallel" in str(overrides) else 1))
    assert code == 0, errors
    first, *rest = [line for line in errors.splitlines() if line.strip()]
    engine = " and DeepSpeed" if "engine=deepspeed" in overrides else ""
    assert first == (
        f"The run computes in fp32 on the CPU with the layers of Megatron-Core{engine}; --verbose says which kernels are used and why."
    )
    assert [line for line in rest if not line.startswith("step ")] == []
