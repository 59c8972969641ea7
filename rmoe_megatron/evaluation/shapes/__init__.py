"""The toy shapes benchmark: an analytic detector and GenEval's rules."""

from rmoe_megatron.evaluation.shapes.detector import Detection, detect
from rmoe_megatron.evaluation.shapes.evaluate import evaluate_shapes, set_record
from rmoe_megatron.evaluation.shapes.rules import Verdict, judge

__all__ = ["Detection", "Verdict", "detect", "evaluate_shapes", "judge", "set_record"]
