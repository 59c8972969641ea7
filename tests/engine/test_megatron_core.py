"""What a change of Megatron-Core's version must not break: old checkpoints, machines without Triton, a quiet start."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.support.runs import losses, make_run, rmoe

# A run of six steps of Megatron-Core 0.16.1 on Python 3.11, its checkpoint after the third, and what followed there.
OLD_CHECKPOINT = Path(__file__).parent / "checkpoints" / "megatron_core_0_16_1.tar.gz"
OLD_LOSSES = {4: 2.058286190032959, 5: 1.936600923538208, 6: 2.040809392929077}
OLD_VALIDATION_LOSS = {6: 1.994152545928955}


def test_a_run_of_the_old_core_goes_on(tmp_path: Path) -> None:
    make_run(tmp_path)
    with tarfile.open(OLD_CHECKPOINT) as tar:
        tar.extractall(tmp_path / "run", filter="data")
    data = [f"data.train={tmp_path}/data/train", f"data.validation={tmp_path}/data/val"]
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
    "overrides", [[], ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]]
)
def test_a_run_says_nothing_but_its_progress(tmp_path: Path, overrides: list[str]) -> None:
    short = ["training.steps=3", "optimizer.warmup_steps=1"]
    code, errors = rmoe("train", str(make_run(tmp_path)), *short, *overrides, ranks=2 if overrides else 1)
    assert code == 0, errors
    lines = [line for line in errors.splitlines() if line.strip() and not line.startswith("step ")]
    assert lines == []
