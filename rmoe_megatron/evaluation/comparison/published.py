"""Scores that others have published, each with where it is published. None of them was measured here.

Every figure was looked up again on 2026-11-30: in the source itself where that could be had (HiDream-I1's, DiT's and SiT's READMEs,
T2I-CoReBench's leaderboard, this method's paper, Flow-GRPO's abstract, Nucleus-Image's release notes), otherwise in several papers that
quote its table (SD3, Sana, Flow-GRPO's SD3.5-large, sFID, precision and recall of DiT and SiT). Looped-DiT's two scores are taken from notes
about its paper, and could be looked up nowhere; their source says so. What else could not be found is not here.
"""

from dataclasses import dataclass, field

SD3 = "Esser et al., 2024 (arXiv 2403.03206)"
HIDREAM = "README of github.com/HiDream-ai/HiDream-I1"
FLOW_GRPO = "Liu et al., 2025 (arXiv 2505.05470)"
SANA = "Xie et al., 2024 (arXiv 2410.10629)"
NUCLEUS = "arXiv 2604.12163"
LOOPED_DIT = "Looped-DiT (arXiv 2609.40305), from notes; not looked up"
THINKING_PIXEL = "The Thinking Pixel (arXiv 2604.25299)"
DIT = "Peebles and Xie, 2022 (arXiv 2212.09748)"
SIT = "Ma et al., 2024 (arXiv 2401.08740v2)"  # its first version had sFID 4.49, IS 277.50 and precision 0.83
COREBENCH = "leaderboard of T2I-CoReBench (t2i-corebench.github.io), judge Qwen3-VL-30B-A3B-Thinking"


@dataclass(frozen=True)
class Published:
    """A published score in the unit of this package's results, and its parts by name where they are published."""

    benchmark: str
    model: str
    score: float
    source: str
    parts: dict[str, float] = field(default_factory=dict)


def _geneval(model: str, score: float, source: str, *tasks: float) -> Published:
    names = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    return Published("GenEval", model, score, source, dict(zip(names, tasks, strict=True)) if tasks else {})


def _imagenet(model: str, fid: float, source: str, **parts: float) -> Published:
    return Published("ImageNet 256", model, fid, source, parts)


def _corebench(model: str, score: float, *dimensions: float) -> Published:
    names = ("C-MI", "C-MA", "C-MR", "C-TR", "R-LR", "R-BR", "R-HR", "R-PR", "R-GR", "R-AR", "R-CR", "R-RR")
    return Published("T2I-CoReBench", model, score, COREBENCH, dict(zip(names, dimensions, strict=True)))


ROWS = [
    _geneval("SD3-medium, 512 pixels", 0.62, SD3, 0.98, 0.74, 0.63, 0.67, 0.34, 0.36),
    _geneval("SD3-medium, as the paper's base", 0.6793, THINKING_PIXEL),
    _geneval("SD3-medium, fine-tuned, one layer", 0.6833, THINKING_PIXEL),
    _geneval("SD3-medium, fine-tuned, three layers", 0.6955, THINKING_PIXEL),
    _geneval("SD3-medium, recursive (M = 2, T = 2, three layers)", 0.7118, THINKING_PIXEL),
    _geneval("SD3.5-medium", 0.63, FLOW_GRPO),
    _geneval("SD3.5-large", 0.71, FLOW_GRPO),
    _geneval("FLUX.1-dev", 0.66, HIDREAM, 0.98, 0.79, 0.73, 0.77, 0.22, 0.45),
    _geneval("SDXL", 0.55, SD3, 0.98, 0.74, 0.39, 0.85, 0.15, 0.23),
    _geneval("PixArt-alpha", 0.48, HIDREAM, 0.98, 0.50, 0.44, 0.80, 0.08, 0.07),
    _geneval("SANA-1.6B", 0.66, SANA),
    _geneval("Nucleus-Image", 0.87, NUCLEUS),
    _geneval("Looped-DiT", 0.874, LOOPED_DIT),
    Published("DPG-Bench", "Looped-DiT", 87.0, LOOPED_DIT),
    Published("DPG-Bench", "SD3-medium", 84.08, HIDREAM),
    Published("DPG-Bench", "SD3-medium, as the paper's base", 85.65, THINKING_PIXEL),
    Published("DPG-Bench", "SD3-medium, fine-tuned", 85.72, THINKING_PIXEL),
    Published("DPG-Bench", "SD3-medium, recursive (M = 5, T = 5)", 85.88, THINKING_PIXEL),
    Published("DPG-Bench", "FLUX.1-dev", 83.79, HIDREAM),
    Published("DPG-Bench", "SDXL", 74.65, HIDREAM),
    Published("DPG-Bench", "PixArt-alpha", 71.11, HIDREAM),
    Published("DPG-Bench", "SANA-1.6B", 84.8, SANA),
    Published("DPG-Bench", "Nucleus-Image", 88.79, NUCLEUS),
    _corebench("SD3-medium", 38.1, 60.7, 59.7, 38.1, 11.2, 30.5, 19.8, 32.3, 57.5, 35.9, 53.5, 38.4, 19.7),
    _corebench("SD3.5-medium", 37.0, 60.5, 61.8, 37.8, 13.4, 26.9, 19.0, 30.0, 56.9, 30.5, 53.9, 36.8, 16.0),
    _corebench("SD3.5-large", 39.0, 58.9, 60.8, 36.5, 21.6, 29.4, 21.1, 31.0, 58.4, 32.7, 56.1, 42.8, 18.7),
    _corebench("FLUX.1-dev", 44.0, 61.0, 62.3, 49.8, 35.8, 30.2, 22.6, 32.5, 68.0, 41.1, 61.7, 40.4, 22.7),
    _corebench("PixArt-alpha", 24.4, 39.9, 42.7, 18.0, 9.9, 15.9, 9.4, 17.9, 32.5, 19.6, 42.4, 29.5, 15.0),
    _imagenet(
        "DiT-XL/2, guidance 1.5", 2.27, DIT, sfid=4.60, inception_score=278.24, precision=0.83, recall=0.57
    ),
    _imagenet(
        "SiT-XL/2, SDE, guidance 1.5", 2.06, SIT, sfid=4.50, inception_score=270.27, precision=0.82, recall=0.59
    ),
    _imagenet("DiT-XL/2, as the paper's base", 2.34, THINKING_PIXEL, recall=0.57),
    _imagenet("DiT-XL/2, recursive", 2.27, THINKING_PIXEL, recall=0.62),
]  # fmt: skip
