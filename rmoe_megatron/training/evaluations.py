"""Benchmarks between the steps of a run, by the averaged weights: all ranks draw, rank 0 judges and writes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from PIL import Image
from torch import Tensor

from rmoe_megatron.config.run import EvaluationConfig, RunConfig
from rmoe_megatron.data.batch import Prompts
from rmoe_megatron.data.shapes.build import make_scene
from rmoe_megatron.data.shapes.scene import Scene
from rmoe_megatron.data.shapes.vocabulary import HELDOUT_PAIRS
from rmoe_megatron.encoders.autoencoder import Autoencoder, decode_latents
from rmoe_megatron.evaluation.shapes.detector import detect
from rmoe_megatron.evaluation.shapes.evaluate import SPLITS, score
from rmoe_megatron.evaluation.shapes.report import JudgedImage, examples
from rmoe_megatron.evaluation.shapes.rules import judge
from rmoe_megatron.training.samples import Denoiser, sample_latents

SET_SEED = 0  # of the scenes: those of `rmoe data build-shapes` by default
BATCH = 32  # prompts that a rank draws at a time


@dataclass(frozen=True)
class Evaluated:
    """What a benchmark gives: metrics by the names they are logged by, and a picture of examples."""

    metrics: dict[str, float]
    picture: Image.Image


class ShapesEvaluation:
    """The toy shapes by GenEval's rules: always the same scenes of its validation splits, drawn from the same noise.

    Args:
        prompts: the encoded captions of :func:`shapes_scenes`, on every rank.
    """

    def __init__(
        self,
        config: RunConfig,
        scenes: list[tuple[str, Scene]],
        prompts: Prompts,
        autoencoder: Autoencoder,
    ) -> None:
        self.config, self.scenes, self.prompts, self.autoencoder = config, scenes, prompts, autoencoder

    def run(self, denoise: Denoiser, height: int, width: int) -> Evaluated | None:
        """Draw a picture for every scene, in latents of this size, and judge them; only rank 0 returns the result.

        Data-parallel ranks share the scenes. Each takes as many batches of as many prompts, which their collectives ask for: what is
        too many repeats the last scene.

        Args:
            denoise: an engine's method; every rank calls it as often.
        """
        group = parallel_state.get_data_parallel_group()
        share = -(-len(self.scenes) // group.size())
        mine = torch.arange(group.rank() * share, (group.rank() + 1) * share).clamp(max=len(self.scenes) - 1)
        drawn = []
        for numbers in mine.split(BATCH):
            latents = sample_latents(
                denoise, self._part(numbers), self.config, height, width, numbers=numbers
            )
            drawn.append(decode_latents(self.autoencoder, latents))
        images = _gathered(torch.cat(drawn).to(self.prompts.conditions.device), group)[: len(self.scenes)]
        return self._judged(images) if dist.get_rank() == 0 else None

    def _part(self, numbers: Tensor) -> Prompts:
        conditions = self.prompts.conditions
        captions = [self.prompts.captions[number] for number in numbers.tolist()]
        places = numbers.to(conditions.device)
        return Prompts(captions, conditions.map(lambda values: values[places]), self.prompts.null_conditions)

    def _judged(self, images: Tensor) -> Evaluated:
        judged = []
        for (split, scene), image in zip(self.scenes, images.cpu().numpy(), strict=True):
            verdict = judge(detect(image), scene.requirements)
            judged.append(JudgedImage(split, scene.skill, scene.caption, image, verdict))
        metrics = {}
        for split in dict.fromkeys(split for split, _ in self.scenes):
            found = score([item for item in judged if item.split == split])
            metrics[f"shapes_{split}"] = found["overall"]
            metrics |= {f"shapes_{split}_{skill}": share for skill, share in found["skills"].items()}
        return Evaluated(metrics, examples(judged))


def shapes_scenes(settings: EvaluationConfig) -> list[tuple[str, Scene]]:
    """Return the scenes of the toy set's validation splits, the first so many of each, whose skills take turns."""
    return [
        (split, make_scene(SET_SEED, folder, number, frozenset(HELDOUT_PAIRS)))
        for split, folder in SPLITS.items()
        for number in range(settings.limit)
    ]


def captions_of(scenes: Sequence[tuple[str, Scene]]) -> list[str]:
    """Return the captions of scenes."""
    return [scene.caption for _, scene in scenes]


def _gathered(images: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the images uint8 [N, H, W, 3] of all ranks of a group, in their order."""
    parts = [torch.empty_like(images) for _ in range(group.size())]
    dist.all_gather(parts, images.contiguous(), group=group)
    return torch.cat(parts)
