"""The toy shapes benchmark: an analytic detector and GenEval's rules."""

from rmoe_megatron.evaluation.shapes.detector import Detection, detect
from rmoe_megatron.evaluation.shapes.evaluate import Settings, evaluate_shapes
from rmoe_megatron.evaluation.shapes.rules import Verdict, judge

__all__ = ["Detection", "Settings", "Verdict", "detect", "evaluate_shapes", "judge"]
