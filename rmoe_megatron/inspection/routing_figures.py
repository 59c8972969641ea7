"""What the decisions of gates amount to: usage, switches, agreement between seeds, usage by word."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from rmoe_megatron.inspection.routing_watch import Place, Routing


def usage(place: Place, num_modules: int) -> np.ndarray:
    """Return the share of tokens for which each module was picked, float [calls, M]."""
    return np.stack([np.bincount(each.ravel(), minlength=num_modules) / each.size for each in place.picked])


def switch_rate(before: Place, after: Place) -> float:
    """Return the share of tokens for which another module was picked than in the latent step before."""
    return float(
        np.mean([(first != second).mean() for first, second in zip(before.picked, after.picked, strict=True)])
    )


def painted_by(place: Place, num_modules: int) -> np.ndarray:
    """Return the module that was picked most often over all calls for each token, int [B, S]; the first of equals."""
    votes = np.stack(
        [sum((each == module).astype(int) for each in place.picked) for module in range(num_modules)]
    )
    return votes.argmax(axis=0)


def agreement(place: Place) -> tuple[float, float]:
    """Return how often two pictures of one prompt have the same module at the same token, and how often they would by chance.

    Chance is that of two picks that know the modules' shares of a call alone. There must be two pictures at least.
    """
    same, chance = [], []
    for picked in place.picked:
        pictures = len(picked)
        pairs = [
            (picked[first] == picked[second]).mean()
            for first in range(pictures)
            for second in range(first + 1, pictures)
        ]
        shares = np.bincount(picked.ravel()) / picked.size
        same.append(np.mean(pairs))
        chance.append((shares**2).sum())
    return float(np.mean(same)), float(np.mean(chance))


def words_of(prompt: str) -> set[str]:
    """Return the words of a prompt in small letters, without marks."""
    return set(re.findall(r"[^\W_]+", prompt.lower()))


def usage_by_word(shares: Mapping[str, np.ndarray], at_least: int = 2) -> dict[str, np.ndarray]:
    """Return by how much a word goes with a module: its mean share in prompts with the word less that in prompts without, float [M].

    Args:
        shares: of every prompt, float [M].
        at_least: prompts with the word and prompts without it that there must be.
    """
    found = {}
    words = {word for prompt in shares for word in words_of(prompt)}
    for word in sorted(words):
        inside = [share for prompt, share in shares.items() if word in words_of(prompt)]
        outside = [share for prompt, share in shares.items() if word not in words_of(prompt)]
        if min(len(inside), len(outside)) >= at_least:
            found[word] = np.mean(inside, axis=0) - np.mean(outside, axis=0)
    return found


def principal_components(states: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Return token states of the latent steps in the two directions of their largest variance, and the shares of variance of the two.

    Args:
        states: float [N, H] of each latent step, the same tokens in all.

    Returns:
        Float [N, 2] of each latent step, about the mean of all; and float [2].
    """
    joined = np.concatenate(states).astype(np.float64)
    centred = joined - joined.mean(axis=0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    shares = sizes[:2] ** 2 / max((sizes**2).sum(), 1e-30)
    return np.split(centred @ directions[:2].T, len(states)), shares


def numbers(routings: Mapping[str, Routing], num_modules: int) -> list[dict[str, object]]:
    """Return the figures of every block, pass and latent step, as JSON has them; means are over prompts and calls of the model."""
    found = []
    heard = list(routings.values())
    for key in heard[0].places:
        block, passed, latent_step = key
        places = [routing.places[key] for routing in heard]
        shares = np.stack([usage(place, num_modules) for place in places])
        entry: dict[str, object] = {
            "block": block, "pass": passed, "latent_step": latent_step,
            "usage": shares.mean(axis=(0, 1)).tolist(),
            "usage_by_timestep": shares.mean(axis=0).tolist(),
            "entropy": float(np.mean([np.mean(place.entropy) for place in places])),
        }  # fmt: skip
        if latent_step > 1:
            before = [routing.places[block, passed, latent_step - 1] for routing in heard]
            rates = [switch_rate(*pair) for pair in zip(before, places, strict=True)]
            entry["switch_rate"] = float(np.mean(rates))
            entry["attention_shift"] = float(np.mean([np.mean(place.shift) for place in places]))
        entry["text_share"] = float(np.mean([np.mean(place.text_share) for place in places]))
        if len(places[0].picked[0]) > 1:
            same, chance = np.mean([agreement(place) for place in places], axis=0)
            entry["agreement_between_seeds"], entry["agreement_by_chance"] = float(same), float(chance)
        of_prompts = {prompt: share.mean(axis=0) for prompt, share in zip(routings, shares, strict=True)}
        entry["usage_by_word"] = {word: each.tolist() for word, each in usage_by_word(of_prompts).items()}
        found.append(entry)
    return found
