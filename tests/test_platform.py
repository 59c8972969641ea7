"""Which GPU a rank takes."""

import pytest
import torch

from rmoe_megatron import platform
from rmoe_megatron.config.run import Device
from rmoe_megatron.errors import UserError
from tests.support.configurations import one_rank, tiny_config


def test_kernels_of_cuda_alone_are_not_taken_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Transformer Engine or Apex is installed, Megatron-Core has their Adam and sums in these places."""
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    monkeypatch.setattr(optimizers, "Adam", object)
    monkeypatch.setattr(optimizers, "USING_PYTORCH_OPTIMIZER", False)
    for module in (clip_grads, optimizer):
        monkeypatch.setattr(module, "multi_tensor_applier", None)
        monkeypatch.setattr(module, "multi_tensor_scale_impl", None)
    flags = ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER")
    for name in flags:
        monkeypatch.setattr(distrib_optimizer, name, True)
    monkeypatch.setattr(clip_grads, "l2_norm_impl", None)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_tensor_impl", object())
    platform.use_cpu()  # does nothing if it has been called before
    platform._use_pytorch_optimizer()
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    weight.grad = torch.tensor([3.0, 4.0])
    assert optimizers.Adam is torch.optim.AdamW
    assert not any(getattr(distrib_optimizer, name) for name in flags)  # or checkpoints would lack the steps
    with one_rank(tiny_config()):
        assert clip_grads.get_grad_norm_fp32(weight.grad, grad_stats_parallel_group=None) == pytest.approx(5)
    clip_grads.clip_grad_by_total_norm_fp32([weight], max_norm=1.0, total_norm=5.0)
    assert weight.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-4)


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
