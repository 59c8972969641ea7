"""Pictures of what the gates of a model decide."""

import io
from collections.abc import Iterable, Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from rmoe_megatron.inspection.routing_figures import painted_by, principal_components, usage, usage_by_word
from rmoe_megatron.inspection.routing_watch import Routing

SHOWN_PROMPTS = 8
SHOWN_TOKENS = 300


def name_of(key: tuple[int, int, int], passes: int) -> str:
    """Return how a picture names a block, a pass of it if there are several, and a latent step."""
    block, passed, latent_step = key
    return f"block {block}{f', pass {passed}' if passes > 1 else ''}, step {latent_step}"


def named(routing: Routing) -> dict[tuple[int, int, int], str]:
    """Return the names of all places."""
    passes = max(passed for _, passed, _ in routing.places)
    return {key: name_of(key, passes) for key in routing.places}


def colours(num_modules: int) -> np.ndarray:
    """Return a colour for each module, float [M, 3]."""
    return colormaps["tab10" if num_modules <= 10 else "turbo"](
        np.arange(num_modules) if num_modules <= 10 else np.linspace(0, 1, num_modules)
    )[:, :3]


def draw_maps(routings: Mapping[str, Routing], images: Mapping[str, np.ndarray], num_modules: int) -> bytes:
    """Draw the first picture of each of the first prompts, and over it which module had each patch most often; returns a PNG.

    Args:
        images: of every prompt, uint8 [B, H, W, 3].
    """
    prompts = list(routings)[:SHOWN_PROMPTS]
    places = named(routings[prompts[0]])
    figure = Figure(figsize=(2.2 * (len(places) + 1), 2.4 * len(prompts) + 0.6), layout="constrained")
    grid = figure.subplots(len(prompts), len(places) + 1, squeeze=False)
    palette = colours(num_modules)
    for row, prompt in zip(grid, prompts, strict=True):
        image = images[prompt][0]
        row[0].imshow(image)
        row[0].set_title(prompt if len(prompt) < 32 else f"{prompt[:31]}…", fontsize=7)
        for axes, (key, name) in zip(row[1:], places.items(), strict=True):
            modules = painted_by(routings[prompt].places[key], num_modules)[0]
            axes.imshow(image)
            axes.imshow(
                palette[as_picture(modules, image.shape[:2])],
                alpha=0.6,
                extent=(-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5),
            )
            axes.set_title(name, fontsize=7)
    for axes in grid.flat:
        axes.set_axis_off()
    if num_modules <= 20:
        handles = [Patch(color=colour, label=f"module {number}") for number, colour in enumerate(palette)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(num_modules, 10), fontsize=7)
    return _png(figure)


def as_picture(tokens: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Lay tokens [S] out as rows and columns of a picture of this height and width."""
    height, width = size
    rows = round((len(tokens) * height / width) ** 0.5)
    return tokens.reshape(rows, -1)


def draw_usage(routings: Mapping[str, Routing], num_modules: int) -> bytes:
    """Draw the share of each module over the timesteps of sampling, a panel for each block and latent step; returns a PNG."""
    first = next(iter(routings.values()))
    places, palette = named(first), colours(num_modules)
    figure = Figure(figsize=(3.2 * len(places), 3), layout="constrained")
    for axes, (key, name) in zip(
        figure.subplots(1, len(places), squeeze=False)[0], places.items(), strict=True
    ):
        shares = np.mean([usage(routing.places[key], num_modules) for routing in routings.values()], axis=0)
        axes.stackplot(
            first.timesteps,
            shares.T,
            colors=palette,
            labels=[f"module {number}" for number in range(num_modules)],
        )
        axes.set(title=name, xlabel="timestep", ylabel="share of tokens", ylim=(0, 1))
        axes.invert_xaxis()
    return _png(figure)


def draw_words(routings: Mapping[str, Routing], num_modules: int) -> bytes:
    """Draw by how much each word goes with each module, a panel for each block and latent step; returns a PNG."""
    places = named(next(iter(routings.values())))
    found = {}
    for key, name in places.items():
        shares = {
            prompt: usage(routing.places[key], num_modules).mean(axis=0)
            for prompt, routing in routings.items()
        }
        found[name] = usage_by_word(shares)
    words = sorted({word for each in found.values() for word in each})
    figure = Figure(figsize=(2.4 * len(places) + 1, 0.2 * len(words) + 1.5), layout="constrained")
    most = (
        max((np.abs(value).max() for each in found.values() for value in each.values()), default=1.0) or 1.0
    )
    for axes, (name, by_word) in zip(
        figure.subplots(1, len(places), squeeze=False)[0], found.items(), strict=True
    ):
        if not words:
            axes.text(
                0.5,
                0.5,
                "No word is in two prompts\nand missing in two.",
                ha="center",
                va="center",
                fontsize=7,
            )
            axes.set_axis_off()
            continue
        drawn = axes.imshow(
            np.stack([by_word[word] for word in words]), cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto"
        )
        axes.set_yticks(range(len(words)), words, fontsize=7)
        axes.set(title=name, xlabel="module")
    if words:
        figure.colorbar(drawn, ax=axes, label="share with the word less without")
    return _png(figure)


def draw_trajectories(routings: Mapping[str, Routing], num_modules: int) -> bytes:
    """Draw how sampled tokens move from latent step to latent step in the two main directions of their states; returns a PNG.

    A row for each block (and pass), a column for the first, the middle and the last sampling step; colours are the modules of the first
    latent step.
    """
    first = next(iter(routings.values()))
    passes = sorted({key[:2] for key in first.places})
    blocks, kept = {block for block, _ in passes}, len(next(iter(first.places.values())).states)
    calls = np.unique([0, len(first.timesteps) // 2, len(first.timesteps) - 1])[:kept]
    palette = colours(num_modules)
    figure = Figure(figsize=(4 * kept, 3.6 * len(passes)), layout="constrained")
    grid = figure.subplots(len(passes), kept, squeeze=False)
    for row, (block, passed) in zip(grid, passes, strict=True):
        for column, axes in enumerate(row):
            steps = [key for key in first.places if key[:2] == (block, passed)]
            states = [
                np.concatenate([_flat(routing.places[key].states[column]) for routing in routings.values()])
                for key in steps
            ]
            modules = np.concatenate(
                [
                    routing.places[steps[0]].picked[calls[column]][:, routing.tokens].ravel()
                    for routing in routings.values()
                ]
            )
            points, shares = principal_components(states)
            drawn = np.unique(
                np.linspace(0, len(modules) - 1, min(len(modules), SHOWN_TOKENS)).round().astype(int)
            )
            points, tints = [each[drawn] for each in points], palette[modules[drawn]]
            for start, end in zip(points, points[1:], strict=False):
                axes.quiver(
                    *start.T,
                    *(end - start).T,
                    color=tints,
                    angles="xy",
                    scale_units="xy",
                    scale=1,
                    width=0.003,
                )
                axes.scatter(*end.T, s=0)  # arrows alone would not widen the axes
            axes.scatter(*points[0].T, c=tints, s=4)
            axes.set_title(
                f"block {block}{f', pass {passed}' if len(passes) > len(blocks) else ''}, timestep {first.timesteps[calls[column]]:.0f}: {shares.sum():.0%} of the variance",
                fontsize=8,
            )
    return _png(figure)


def _flat(states: np.ndarray) -> np.ndarray:
    return states.reshape(-1, states.shape[-1])


def draw_attention(routings: Mapping[str, Routing]) -> bytes:
    """Draw over the timesteps what attention goes to the text, and by how much it moves between latent steps; returns a PNG."""
    first = next(iter(routings.values()))
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    text, shift = figure.subplots(1, 2)
    for key, name in named(first).items():
        of_prompts = [routing.places[key] for routing in routings.values()]
        text.plot(first.timesteps, _mean(place.text_share for place in of_prompts), label=name)
        if of_prompts[0].shift:
            shift.plot(first.timesteps, _mean(place.shift for place in of_prompts), label=name)
    text.set(title="attention that goes to the text", xlabel="timestep", ylim=(0, None))
    shift.set(title="attention that moves since the latent step before", xlabel="timestep", ylim=(0, None))
    for axes in (text, shift):
        axes.invert_xaxis()
        if axes.lines:
            axes.legend(fontsize=7)
    return _png(figure)


def _mean(values: Iterable[list[np.ndarray]]) -> np.ndarray:
    """Return the mean over prompts and pictures, float [calls]."""
    means: np.ndarray = np.mean([[np.mean(call) for call in each] for each in values], axis=0)
    return means


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()
