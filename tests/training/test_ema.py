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
