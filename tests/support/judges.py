"""Tiny random judges of images, saved by transformers in the form of the published ones."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
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
    # As the published folders have it, which are older than transformers' present form.
    processor = {
        "feature_extractor_type": "CLIPFeatureExtractor", "size": 16, "crop_size": 16, "resample": 3, "do_resize": True,
        "do_center_crop": True, "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows letters, spaces and Qwen's marks."""
    marks = [
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|endoftext|>",
    ]
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({token: number for number, token in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": marks})
    return fast


def save_hpsv3(weights: Path, base: Path) -> tuple[Qwen2VLForConditionalGeneration, dict[str, torch.Tensor]]:
    """A Qwen2-VL with HPSv3's head, under the names of the published weights, and what else it is loaded from, in another folder.

    Returns:
        The model without the head, and the head's weights.
    """
    torch.manual_seed(4)
    tokenizer = qwen_tokenizer()
    tokenizer.save_pretrained(base)
    number = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer) + 1, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=number("<|image_pad|>"),
        vision_start_token_id=number("<|vision_start|>"), vision_end_token_id=number("<|vision_end|>"),
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config).eval()
    shapes = {"0": (1024, 16), "3": (16, 1024), "5": (2, 16)}
    head = {f"rm_head.{name}.weight": torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    head |= {f"rm_head.{name}.bias": torch.randn(shape[0]) * 0.2 for name, shape in shapes.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    tensors = {
        name.replace("model.visual.", "visual.").replace(
            "model.language_model.", "model."
        ): tensor.contiguous()
        for name, tensor in model.state_dict().items()
    }
    weights.mkdir(parents=True, exist_ok=True)
    save_file(tensors | head, weights / "HPSv3.safetensors")
    # The published base says all of the text model at the top, and has more rows than tokens.
    marks = {
        name: getattr(config, name)
        for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id")
    }
    published = (
        text | marks | {"model_type": "qwen2_vl", "vision_config": vision, "vocab_size": len(tokenizer) + 6}
    )
    (base / "config.json").write_text(json.dumps(published))
    processor = {
        "min_pixels": 64,
        "max_pixels": 1 << 20,
        "patch_size": 4,
        "image_processor_type": "Qwen2VLImageProcessor",
    }
    (base / "preprocessor_config.json").write_text(json.dumps(processor))
    return model, head


def save_answerer(
    folder: Path, mixture: bool = False, thinking: bool = False, brief: bool = False
) -> Qwen3VLForConditionalGeneration | Qwen3VLMoeForConditionalGeneration:
    """A Qwen3-VL, dense or a mixture of four experts, that knows letters, spaces, yes, no and its own marks.

    Args:
        thinking: its chat template begins answers with thoughts.
        brief: it answers everything with yes or no, as its picture has it, and ends; otherwise it writes on at random.
    """
    torch.manual_seed(2)
    fast = qwen_tokenizer()
    fast.add_tokens(["yes", "no"])
    begin = "<think>\\n" if thinking else ""
    fast.chat_template = "{{- '<|im_start|>assistant\\n" + begin + "' }}"
    fast.save_pretrained(folder)
    number = fast.convert_tokens_to_ids
    text = {
        "vocab_size": len(fast), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4, "out_hidden_size": 16,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24} if mixture else {}
    config_class, model_class = (
        (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration)
        if mixture
        else (Qwen3VLConfig, Qwen3VLForConditionalGeneration)
    )
    config = config_class(
        text_config=text | experts, vision_config=vision, image_token_id=number("<|image_pad|>"),
        vision_start_token_id=number("<|vision_start|>"), vision_end_token_id=number("<|vision_end|>"),
    )  # fmt: skip
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        if brief:
            _answer_with_a_word(model, *number(["yes", "no", "<|im_end|>"]))
    model.save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 1024}
    Qwen2VLImageProcessorPil(patch_size=4, size=size).save_pretrained(folder)
    return model


def _answer_with_a_word(model: Qwen3VLForConditionalGeneration, yes: int, no: int, end: int) -> None:
    """Let the second number of the last state decide between yes and no, and the first, which those two make large, end the answer."""
    text = model.model.language_model
    text.embed_tokens.weight[[yes, no]] = 0.0
    text.embed_tokens.weight[[yes, no], 0] = 1000.0
    text.norm.weight[:2] = 1.0
    model.lm_head.weight[[yes, no, end]] = 0.0
    model.lm_head.weight[yes, 1], model.lm_head.weight[no, 1] = 1000.0, -1000.0
    model.lm_head.weight[end, 0] = 100.0
