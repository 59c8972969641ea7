"""When a run says that its gates need a look."""

from pathlib import Path

import pytest

from rmoe_megatron.training.gate_alarms import GateAlarms, gate_alarms
from tests.support.commands import rmoe
from tests.support.runs import make_run

WELL = {
    "gate_entropy_1_2": 0.6,
    "gate_by_timestep_1_2": 0.3,
    "module_share_1_2_0": 0.4,
    "module_share_1_2_3": 0.02,
    "loss": 0.0,
}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("module_share_1_2_0", 0.91, "module 0 of layer 1 gets 91.0% of the tokens in latent step 2"),
        ("module_share_1_2_3", 0.009, "module 3 of layer 1 gets 0.9% of the tokens in latent step 2"),
        (
            "gate_entropy_1_2",
            0.01,
            "the gate of layer 1 in latent step 2 is nearly certain of every token (entropy 0.010 of 1)",
        ),
        (
            "gate_by_timestep_1_2",
            0.85,
            "the gate of layer 1 in latent step 2 looks at the timestep (85% of its logits' variance)",
        ),
    ],
)
def test_each_kind_says_what_it_found(name: str, value: float, words: str) -> None:
    assert gate_alarms(WELL, num_modules=4) == {}
    assert gate_alarms(WELL | {name: value}, num_modules=4) == {name: words}


def test_an_even_share_of_many_modules_is_small() -> None:
    """1 % of the tokens for each of 100 modules is what balance means; 0.1 % is not."""
    assert gate_alarms({"module_share_0_1_7": 0.01}, num_modules=100) == {}
    assert set(gate_alarms({"module_share_0_1_7": 0.001}, num_modules=100)) == {"module_share_0_1_7"}


def test_it_is_said_once_and_again_after_all_was_well() -> None:
    alarms, starving = (
        GateAlarms(num_modules=8),
        WELL | {f"module_share_1_1_{module}": 0.0 for module in range(5)},
    )
    line = alarms.line(starving)
    assert line is not None
    assert line.startswith("WARNING: module 0 of layer 1 gets 0.0% of the tokens in latent step 1; module 1 ")
    assert "; and 2 more." in line
    assert "\n" not in line
    assert alarms.line(starving) is None
    assert alarms.line(WELL) is None
    assert alarms.line(starving) == line


def test_a_run_says_it(tmp_path: Path) -> None:
    """A learning rate of 50 tears the gate apart: it is certain of all tokens, or sends them all to one module."""
    config = make_run(tmp_path)
    code, errors = rmoe(
        "train",
        str(config),
        "training.steps=6",
        "optimizer.group_learning_rates.gate=50",
        "training.sample_prompts=[]",
    )
    assert code == 0, errors
    said = [line for line in errors.splitlines() if "WARNING: " in line and "of layer" in line]
    assert said
    assert len(said) <= 6
