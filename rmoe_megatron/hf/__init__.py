"""The diffusers side: model and pipeline classes that need no Megatron-Core, import and export."""

import diffusers

from rmoe_megatron.hf.dit_pipeline import RecurrentDiTPipeline
from rmoe_megatron.hf.pipeline import RecurrentSD3Pipeline
from rmoe_megatron.hf.pixel_codec import PixelCodec
from rmoe_megatron.hf.recurrent_dit import RecurrentDiTTransformer2DModel
from rmoe_megatron.hf.recurrent_sd3 import RecurrentSD3Transformer2DModel
from rmoe_megatron.hf.tuned_sd3_pipeline import TunedSD3Pipeline

# DiffusionPipeline.from_pretrained looks a folder's pipeline class up as an attribute of diffusers; there is no registry.
for _pipeline in (RecurrentDiTPipeline, RecurrentSD3Pipeline, TunedSD3Pipeline):
    setattr(diffusers, _pipeline.__name__, _pipeline)

__all__ = [
    "PixelCodec",
    "RecurrentDiTPipeline",
    "RecurrentDiTTransformer2DModel",
    "RecurrentSD3Pipeline",
    "RecurrentSD3Transformer2DModel",
    "TunedSD3Pipeline",
]
