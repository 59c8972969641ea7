"""Which GPU a rank takes."""

import pytest
import torch

from rmoe_megatron.config.run import Device
from rmoe_megatron.distributed import device, megatron_on_cpu
from rmoe_megatron.errors import UserError


def test_kernels_of_cuda_alone_are_not_taken_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Transformer Engine or Apex is installed, Megatron-Core has their Adam and copies in these places."""
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer, optimizer

    monkeypatch.setattr(optimizers, "Adam", object)
    monkeypatch.setattr(optimizers, "USING_PYTORCH_OPTIMIZER", False)
    for name in ("multi_tensor_applier", "multi_tensor_scale_impl"):
        monkeypatch.setattr(optimizer, name, None)
    flags = ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER")
    for name in flags:
        monkeypatch.setattr(distrib_optimizer, name, True)
    megatron_on_cpu.use_cpu()  # does nothing if it has been called before
    megatron_on_cpu._use_pytorch_optimizer()
    assert optimizers.Adam is torch.optim.AdamW
    assert not any(getattr(distrib_optimizer, name) for name in flags)  # or checkpoints would lack the steps
    copied = torch.zeros(2)
    optimizer._multi_tensor_copy_this_to_that([torch.tensor([3.0, 4.0])], [copied], torch.zeros(1))
    assert copied.tolist() == [3.0, 4.0]


def test_a_rank_takes_the_gpu_of_its_number_and_says_when_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(device, "_has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert device.select_device(Device.auto, local_rank=1) == torch.device("cuda", 1)
    assert taken == [1]
    with pytest.raises(UserError, match=r"Rank 2 of this host finds 2 GPU\(s\)"):
        device.select_device(Device.cuda, local_rank=2)
