"""Tiny random judges of images, saved by transformers in the form of the published ones."""

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

from tests.support.sd3_pipeline import clip_tokenizer


def save_detector(folder: Path) -> Mask2FormerForUniversalSegmentation:
    """A Mask2Former for COCO's 80 classes that sees something in every image."""
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=8,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=12, num_labels=80,
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():  # sharp classes, so that some scores are high
        model.class_predictor.weight.mul_(200)
        model.class_predictor.bias[-1] = -5
    model.save_pretrained(folder)
    return model


def save_clip(folder: Path) -> CLIPModel:
    """A CLIP with its tokenizer."""
    torch.manual_seed(1)
    text = {
        "vocab_size": 54, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 4,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return model
