"""The moving average against diffusers' EMAModel."""

import pytest
import torch
from diffusers.training_utils import EMAModel

from rmoe_megatron.training.ema import ExponentialMovingAverage


@pytest.mark.parametrize("power", [None, 2 / 3, 0.75])
def test_averages_equal_diffusers(power: float | None) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    ours = ExponentialMovingAverage(dict(model.named_parameters()), decay=0.95, power=power)
    theirs = EMAModel(
        model.parameters(), decay=0.95, use_ema_warmup=power is not None, inv_gamma=1.0, power=power or 1.0
    )
    for step in range(200):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update(step)
        theirs.step(model.parameters())
        for actual, expected in zip(ours.averages.values(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(actual, expected)


def test_the_first_averages_by_hand() -> None:
    """Weights 1, 3, 5, 9: the first update forgets where the run began, the next keep 2/11 and 3/12 of what was."""
    weight = torch.nn.Parameter(torch.ones(1))
    average = ExponentialMovingAverage({"weight": weight}, decay=0.2)
    found = []
    for step, value in enumerate((3.0, 5.0, 9.0)):
        weight.data.fill_(value)
        average.update(step)
        found.append(average.averages["weight"].item())
    second = 2 / 11 * 3 + 9 / 11 * 5
    assert found == pytest.approx(
        [3, second, 0.2 * second + 0.8 * 9], rel=1e-6
    )  # 3/12 is above the decay of 0.2
