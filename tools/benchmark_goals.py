"""What the step benchmarks want to see, by width of the model, precision and kind of processor."""

from rmoe_megatron.config.run import Precision

# Width of the model up to which it holds: our eager step over diffusers' eager step.
DENSE_BF16 = {192: 0.45, 256: 0.50, 1 << 16: 0.80}  # a CPU with instructions for bf16
DENSE_FP32 = {192: 0.75, 256: 0.80, 1 << 16: 0.92}  # any CPU
COMPILED_BF16 = 0.85  # our compiled step over diffusers' compiled step, a CPU with instructions for bf16
# The recurrent step (M=5, T=2) over the dense one, as a multiple of the ratio of their FLOPs; any CPU.
RECURRENCE = {192: 1.18, 1 << 16: 1.10}


def dense_goal(width: int, precision: Precision, bf16_is_fast: bool) -> float | None:
    """Return how long our step may take at most over diffusers' on a CPU; None where there is no goal."""
    if precision is Precision.fp32:
        return _of_width(DENSE_FP32, width)
    return _of_width(DENSE_BF16, width) if precision is Precision.bf16 and bf16_is_fast else None


def compiled_goal(precision: Precision, bf16_is_fast: bool) -> float | None:
    """Return the same for both steps compiled."""
    return COMPILED_BF16 if precision is Precision.bf16 and bf16_is_fast else None


def recurrence_goal(width: int) -> float:
    """Return how much more than its FLOPs say a recurrent step may take at most."""
    return _of_width(RECURRENCE, width)


def judged(ratio: float, goal: float | None) -> str:
    """Return a ratio with its goal and whether it is reached, for a line of a report."""
    if goal is None:
        return f"{ratio:.3f} (no goal for this device and precision)"
    return f"{ratio:.3f} (goal: at most {goal:.2f}, {'reached' if ratio <= goal else 'not reached'})"


def _of_width(goals: dict[int, float], width: int) -> float:
    return next(goal for most, goal in goals.items() if width <= most)
