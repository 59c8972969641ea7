"""Recursive sparse mixture-of-experts for text-to-image diffusion transformers on Megatron-Core."""

import importlib.util
import sys
from types import ModuleType


def _stand_in_for_triton_kernels() -> None:
    """Let Megatron-Core be imported where there is no Triton (PyTorch for the CPU, macOS).

    Its schedules import these GPU kernels by name; nothing on such a machine calls them. It has to happen before the
    first import of Megatron-Core, wherever that is, and so happens here.
    """
    kernels = ModuleType("megatron.core.transformer.moe.ops.paged_stash")
    for name in ("GLOBAL_BLOCK_SIZE", "paged_stash_copy_kernel", "paged_stash_pop_kernel"):
        setattr(kernels, name, None)
    sys.modules.setdefault(kernels.__name__, kernels)


if importlib.util.find_spec("triton") is None:
    _stand_in_for_triton_kernels()
