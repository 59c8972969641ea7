"""The rows that plans are held to: those of a JSON of gpu_check, and those of the ledger."""

import json
from pathlib import Path

import calibrate_plan
import pytest

from rmoe_megatron.errors import UserError


def test_rows_of_a_gpu_check(tmp_path: Path) -> None:
    size = {"pixels": 512, "batch": 4, "seconds": 0.5, "peak_gb": 40.0}
    results = [
        {"name": "speed_dense", "status": "ok", "figures": {"sizes": [size, size | {"pixels": 1024}]}},
        {"name": "speed_m5_t5", "status": "failed", "figures": {}},
        {"name": "timeline", "status": "ok", "figures": {}},
    ]
    path = tmp_path / "gpu_check.json"
    path.write_text(json.dumps({"results": results}))
    first, second = calibrate_plan.rows_of(path)
    assert first == calibrate_plan.Row("speed_dense", 512, 4, 0.5, 40e9)
    assert second.pixels == 1024
    path.write_text(json.dumps({"results": results[1:]}))
    with pytest.raises(UserError, match="no measured steps"):
        list(calibrate_plan.rows_of(path))


def test_rows_of_the_ledger() -> None:
    """53.84 pictures a second, 32 in a step, are 594 ms; 102 GB as the page has it."""
    row = next(iter(calibrate_plan.recorded_rows()))
    assert row.seconds == pytest.approx(0.594, abs=0.001)
    assert (row.pixels, row.batch, row.peak) == (512, 32, 102e9)
    config = calibrate_plan.config_of(row)
    assert (config.model.sample_size, config.training.micro_batch_size, config.model.num_layers) == (
        64,
        32,
        24,
    )
