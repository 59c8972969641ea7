"""How many bytes PyTorch's tensors take at most while something runs, apart from what the C library keeps beside."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_tensor_bytes(action: Callable[[], object], device: torch.device) -> int:
    """Run ``action`` and return how far the bytes of all tensors on ``device`` have risen above those of before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    held = peak = 0
    for change in _changes(action):
        held += change
        peak = max(peak, held)
    return peak


def held_tensor_bytes(action: Callable[[], object]) -> int:
    """Run ``action`` and return by how many bytes all tensors on the CPU have grown when it is over."""
    return sum(_changes(action))


def _changes(action: Callable[[], object]) -> list[int]:
    """Run ``action`` and return the bytes of allocations and, negative, of releases on the CPU in the order of time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        action()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    return [change for _, change in sorted(changes)]
