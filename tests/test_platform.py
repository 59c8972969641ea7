"""Which GPU a rank takes."""

import pytest
import torch

from rmoe_megatron import platform
from rmoe_megatron.config.run import Device
from rmoe_megatron.errors import UserError


def test_a_rank_takes_the_gpu_of_its_number_and_says_when_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(platform, "_has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert platform.select_device(Device.auto, local_rank=1) == torch.device("cuda", 1)
    assert taken == [1]
    with pytest.raises(UserError, match=r"Rank 2 of this host finds 2 GPU\(s\)"):
        platform.select_device(Device.cuda, local_rank=2)
