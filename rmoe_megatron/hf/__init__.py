"""The diffusers side: model and pipeline classes that need no Megatron-Core, and the export to them."""

from rmoe_megatron.encoders.autoencoder import PixelCodec
from rmoe_megatron.hf.pipeline import RecurrentSD3Pipeline
from rmoe_megatron.hf.transformer import RecurrentSD3Transformer2DModel

__all__ = ["PixelCodec", "RecurrentSD3Pipeline", "RecurrentSD3Transformer2DModel"]
