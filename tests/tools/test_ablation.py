"""The ablation tool: every row is a valid configuration that differs in what its name says; the table's arithmetic."""

import importlib.util
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

from rmoe_megatron.config.loading import load_config
from rmoe_megatron.model.checks import check_model

CONFIG = Path("configs/shapes_tiny_fine_tuning.yaml")


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablation", "tools/ablation.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablation"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_row_is_valid_and_differs_in_one_thing(ablation: ModuleType) -> None:
    base = load_config(CONFIG, [])
    changed = {}
    for variant in ablation.variants(base):
        config = load_config(CONFIG, list(variant.overrides))
        check_model(config)
        if config.recurrence is None:
            changed[variant.name] = "lora" if config.lora else config.fine_tuning.trainable.value
            continue
        before, after = asdict(base.recurrence), asdict(config.recurrence)
        changed[variant.name] = ",".join(key for key in before if before[key] != after[key])
    assert changed == {
        "SFT": "blocks", "LoRA": "lora", "recursive M=2 T=2": "", "without step modulation": "modulation",
        "gate on tokens only": "gate_inputs", "one block": "layers", "T=1": "steps", "T=5": "steps",
        "M=1": "num_modules", "M=5": "num_modules",
    }  # fmt: skip


def test_table_has_mean_and_standard_deviation(ablation: ModuleType, tmp_path: Path) -> None:
    scores = [ablation.Score(seen, 0.2, {"counting": seen}) for seen in (0.5, 0.6, 0.7)]
    rows = {"base": scores[:1], "SFT": scores}
    lines = ablation.table(rows).splitlines()
    assert lines[2] == "| base | 50.0 | 20.0 | 50.0 |"
    assert lines[3] == "| SFT | 60.0 ± 10.0 | 20.0 ± 0.0 | 60.0 ± 10.0 |"
    ablation.plot(rows, tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 1000
