"""A tiny Stable Diffusion 3 pipeline with random weights, built and saved by diffusers and transformers."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from tests.support.configurations import randomise
from tests.support.diffusers_models import SD3

WORDS = ["a", "two", "red", "circles", "cat"]
T5_WIDTH = 48
TEXT_LENGTH = 77 + 6


def clip_tokenizer() -> CLIPTokenizer:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = letters + [f"{letter}</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocabulary, [], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS]
    return T5Tokenizer(pieces, extra_ids=0, model_max_length=512)


def clip(hidden_size: int, projection_dim: int, seed: int) -> CLIPTextModelWithProjection:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=hidden_size, projection_dim=projection_dim, intermediate_size=24,
        num_hidden_layers=3, num_attention_heads=2, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config).eval()


def make_pipeline(shift_factor: float = 0.06, **architecture: Any) -> StableDiffusion3Pipeline:
    """All components random; pooled width is CLIP-L's plus CLIP-G's projection.

    Args:
        architecture: arguments of the transformer that differ from SD3-medium's, such as SD3.5's QK norms and second attentions.
    """
    torch.manual_seed(3)
    t5 = T5EncoderModel(T5Config(vocab_size=9, d_model=T5_WIDTH, d_kv=8, d_ff=16, num_layers=2, num_heads=2))
    transformer = SD3Transformer2DModel(
        **SD3 | {"joint_attention_dim": T5_WIDTH, "pooled_projection_dim": 28} | architecture
    )
    randomise(transformer, std=0.1)
    autoencoder = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=1.5305, shift_factor=shift_factor, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder.eval(),
        text_encoder=clip(16, 12, seed=1),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(24, 16, seed=2),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5.eval(),
        tokenizer_3=t5_tokenizer(),
    )


def save_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """Save a tiny pipeline and return it as it is loaded again."""
    make_pipeline().save_pretrained(folder)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
