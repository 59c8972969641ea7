"""Published model sizes that ``model.preset`` names; other keys of the ``model`` section override them."""

from typing import Any

_SD3: dict[str, Any] = {
    "architecture": "mmdit",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "text_length": 77 + 256,  # CLIP's tokens, then T5's
    "text_hidden_size": 4096,
    "pooled_size": 768 + 1280,
}


def _sd3(num_layers: int, pos_embed_max_size: int, qk_norm: bool, dual_attention: int = 0) -> dict[str, Any]:
    return _SD3 | {
        "num_layers": num_layers,
        "hidden_size": 64 * num_layers,
        "num_attention_heads": num_layers,
        "pos_embed_max_size": pos_embed_max_size,
        "qk_norm": qk_norm,
        "dual_attention_layers": list(range(dual_attention)),
    }


_DIT_SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}


def _dit(size: str, patch_size: int) -> dict[str, Any]:
    num_layers, hidden_size, num_attention_heads = _DIT_SIZES[size]
    return {
        "architecture": "dit",
        "sample_size": 32,  # ImageNet at 256 pixels
        "patch_size": patch_size,
        "in_channels": 4,
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "qk_norm": False,
        "mlp_norm_eps": 1.0e-5,
        "num_classes": 1000,
        "learned_sigma": True,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "sd3_medium": _sd3(24, 192, qk_norm=False),
    "sd3.5_medium": _sd3(24, 384, qk_norm=True, dual_attention=13),
    "sd3.5_large": _sd3(38, 192, qk_norm=True),
} | {f"dit_{size}_{patch_size}": _dit(size, patch_size) for size in _DIT_SIZES for patch_size in (2, 4, 8)}
