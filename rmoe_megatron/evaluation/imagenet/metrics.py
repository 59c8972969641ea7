"""FID, sFID, Inception score, precision and recall from features, as ADM's evaluation (openai/guided-diffusion) computes them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

type Floats = NDArray[np.floating]

NEIGHBOURS = 3  # whose distance is an image's radius in feature space
SPLIT = 5000  # images per part of the Inception score
BLOCK = 10_000  # features compared with as many others at a time, as in ADM's evaluation


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of features, float64."""

    mean: Floats
    covariance: Floats


class RunningGaussian:
    """Mean and covariance of features that come in batches; they are never all in memory.

    Batches are merged by Chan's formula, so that a large mean costs no digits.
    """

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.mean = np.zeros(dimension)
        self.scatter = np.zeros((dimension, dimension))

    def add(self, features: Floats) -> None:
        """Take a batch [N, D] in."""
        batch = np.asarray(features, dtype=np.float64)
        mean = batch.mean(axis=0)
        centred, total = batch - mean, self.count + len(batch)
        shift = mean - self.mean
        self.scatter += centred.T @ centred + np.outer(shift, shift) * (self.count * len(batch) / total)
        self.mean += shift * (len(batch) / total)
        self.count = total

    def result(self) -> Gaussian:
        """Return mean and covariance, the latter divided by N - 1."""
        return Gaussian(self.mean, self.scatter / max(self.count - 1, 1))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Return the Fréchet distance |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians.

    The trace of the root is that of the symmetric (C1^(1/2) C2 C1^(1/2))^(1/2), whose eigenvalues are real; covariances of fewer
    images than dimensions are no trouble.
    """
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ other.covariance @ root)
    trace_of_root = np.sqrt(np.clip(inner, 0, None)).sum()
    difference = one.mean - other.mean
    traces = np.trace(one.covariance) + np.trace(other.covariance)
    return float(difference @ difference + traces - 2 * trace_of_root)


def inception_score(probabilities: Iterable[Floats], split: int = SPLIT) -> float:
    """Return exp(E KL(p(y|x) || p(y))), the mean over parts of ``split`` images.

    Args:
        probabilities: probabilities of the classes, in batches [N, C]; they are cut into parts in their order.
    """
    everything = np.concatenate(list(probabilities)).astype(np.float64)
    scores = []
    for start in range(0, len(everything), split):
        part = np.clip(everything[start : start + split], np.finfo(np.float64).tiny, None)
        divergence = (part * (np.log(part) - np.log(part.mean(axis=0)))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def precision_and_recall(
    reference: Floats, samples: Floats, device: torch.device, half: bool = False
) -> tuple[float, float]:
    """Return the share of samples in the reference's manifold, and of the reference in the samples' (Kynkäänniemi et al., 2019).

    A point is in a manifold if it is no farther from one of its points than that one's third neighbour is.

    Args:
        reference: features [N, D].
        samples: features [M, D].
        half: take squared distances in float16, block by block, as ADM's evaluation does wherever none of a block overflows.
            Neighbours then come to lie at equal distances, and both shares are larger.
    """
    real, fake = (
        torch.from_numpy(np.asarray(each, dtype=np.float32)).to(device) for each in (reference, samples)
    )
    distances = _half_distances if half else _squared_distances
    return _share_inside(fake, real, distances), _share_inside(real, fake, distances)


Distances = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _share_inside(points: torch.Tensor, manifold: torch.Tensor, distances: Distances) -> float:
    radii = torch.cat(
        [
            # The nearest is the point itself.
            _by_blocks(rows, manifold, distances).topk(NEIGHBOURS + 1, dim=1, largest=False).values[:, -1]
            for rows in manifold.split(BLOCK)
        ]
    )
    inside = [(_by_blocks(rows, manifold, distances) <= radii).any(dim=1) for rows in points.split(BLOCK)]
    return float(torch.cat(inside).double().mean())


def _by_blocks(rows: torch.Tensor, columns: torch.Tensor, distances: Distances) -> torch.Tensor:
    return torch.cat([distances(rows, block) for block in columns.split(BLOCK)], dim=1)


def _squared_distances(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    products = rows @ columns.T
    squares = rows.square().sum(dim=1)[:, None] + columns.square().sum(dim=1)
    return (squares - 2 * products).clamp_(min=0)


def _half_distances(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return squared distances float32 [N, M] that were taken in float16, unless one of them is not finite there.

    Every operation is rounded to float16; sums over features are accumulated in float32, as matrix units do it.
    """
    short, wide = rows.half(), columns.half()
    products = (short.float() @ wide.float().T).half()
    squares = [each.square().float().sum(dim=1).half() for each in (short, wide)]
    found = (squares[0][:, None] - 2 * products + squares[1]).clamp_(min=0).float()
    return found if found.isfinite().all() else _squared_distances(rows, columns)
