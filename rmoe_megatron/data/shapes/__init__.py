"""The toy shapes set: a small synthetic compositional text-to-image data set with exact ground truth."""

from rmoe_megatron.data.shapes.build import build_shapes

__all__ = ["build_shapes"]
