"""How the gates of a model decide: shares of the experts, entropy, margin, switches, and what the logits depend on."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.model.recurrence.gate_watch import GateCall, columns

TIME_BINS = 10  # of equal width, of the drawn time in [0, 1)


def gate_health(
    config: RunConfig, calls: list[GateCall], drawn_time: Callable[[Tensor], Tensor], device: torch.device
) -> dict[str, float]:
    """Return what the gates' calls of a step say, for every layer and latent step and as means over all of them.

    Every rank takes part with the calls of its own gates and tokens; all get the figures of the whole global batch. The dict is empty for
    a model without a choice of experts.

    Args:
        drawn_time: gives samples' rng_keys, int64 [B], a float32 [B] in [0, 1) from which their timesteps follow.

    Returns:
        For ``LAYER`` from 0 and the latent step ``STEP`` from 1, ``module_share_LAYER_STEP_MODULE`` and those of :func:`figures` with
        ``_LAYER_STEP`` behind them. Without it: their means; ``module_share_least`` and ``module_share_most`` are the extremes.
    """
    recurrence = config.recurrence
    if recurrence is None or recurrence.num_modules == 1:
        return {}
    table = _moments(
        calls, drawn_time, config.model.num_layers, recurrence.steps, recurrence.num_modules, device
    )
    dist.all_reduce(table)
    # Ranks that share the tokens have put in the same sums.
    table /= parallel_state.get_tensor_and_context_parallel_group().size()
    values = table.cpu().numpy()
    found: dict[str, float] = {}
    by_name: dict[str, list[float]] = {}
    shares: list[float] = []
    for layer in recurrence.layers:
        for latent_step in range(1, recurrence.steps + 1):
            sums = values[layer, latent_step - 1]
            place = f"{layer}_{latent_step}"
            share = sums[columns(recurrence.num_modules)["picked"]] / sums[0]
            shares += share.tolist()
            found |= {f"module_share_{place}_{module}": value for module, value in enumerate(share.tolist())}
            for name, value in figures(sums, recurrence.num_modules, is_first=latent_step == 1).items():
                found[f"{name}_{place}"] = value
                by_name.setdefault(name, []).append(value)
    means = {name: math.fsum(each) / len(each) for name, each in by_name.items()}
    return {"module_share_least": min(shares), "module_share_most": max(shares), **means, **found}


def figures(sums: np.ndarray, num_modules: int, is_first: bool) -> dict[str, float]:
    """Return what the moments of one layer and latent step say; see :func:`_moments` for their order.

    ``gate_entropy``: the mean entropy of softmax(logits), from 0, one expert is certain, to 1, all are equally likely; ``gate_margin``: the
    mean distance of the largest logit from the second; ``gate_switch_rate``: the share of tokens whose most likely expert is another one
    than in the latent step before (not of the first step). ``gate_by_timestep``, ``gate_by_text`` and ``gate_by_token``: the shares of the
    logits' variance between samples of different timesteps, between samples of the same timestep (whose texts, pictures and noise differ),
    and between the tokens of a sample. The first is estimated without bias from ten bins of the timestep (epsilon squared, Kelley, 1935),
    since few samples in a bin differ by chance; none of the three is there if the logits do not differ, or if samples are no more than bins.
    """
    at = columns(num_modules)
    width = at["logits"].stop
    tokens = sums[0]
    found = {
        "gate_entropy": float(sums[at["entropy"]][0] / tokens / math.log(num_modules)),
        "gate_margin": float(sums[at["margin"]][0] / tokens),
    }
    if not is_first:
        found["gate_switch_rate"] = float(sums[at["switched"]][0] / tokens)
    of_samples, samples = sums[width : width + 2]
    bins = sums[width + 2 :].reshape(TIME_BINS, 2 + num_modules)
    bins = bins[bins[:, 0] > 0]
    of_mean = float(np.square(sums[at["logits"]]).sum() / tokens)
    total = float(sums[at["squares"]][0]) - of_mean
    between_samples = float(of_samples) - of_mean
    between_bins = float((np.square(bins[:, 2:]).sum(axis=1) / bins[:, 1]).sum()) - of_mean
    if total > 1e-12 * float(sums[at["squares"]][0]) and samples > len(bins):
        by_chance = (len(bins) - 1) * (between_samples - between_bins) / (samples - len(bins))
        by_timestep = max(between_bins - by_chance, 0.0) / total
        found["gate_by_timestep"] = by_timestep
        found["gate_by_text"] = max(between_samples / total - by_timestep, 0.0)
        found["gate_by_token"] = 1 - between_samples / total
    return found


def _moments(
    calls: list[GateCall],
    drawn_time: Callable[[Tensor], Tensor],
    num_layers: int,
    latent_steps: int,
    num_modules: int,
    device: torch.device,
) -> Tensor:
    """Return float64 [layers, T, F], sums over this rank's samples of what adds up over all.

    The F columns are those of :func:`rmoe_megatron.model.recurrence.gate_watch.columns`; the sum over samples of ``|l|^2 / n`` with l the sum
    of the logits over a sample's n tokens; the number of samples; and for each of the bins of time number of samples, of tokens, and logits.
    """
    at = columns(num_modules)
    width = at["logits"].stop + 2 + TIME_BINS * (2 + num_modules)
    table = torch.zeros(num_layers * latent_steps, width, dtype=torch.float64, device=device)
    if calls:
        sums = torch.cat([call.sums for call in calls])
        # Ranks of this group have parts of the same samples' tokens, or all of them have all.
        dist.all_reduce(sums, group=parallel_state.get_tensor_and_context_parallel_group())
        tokens, logits = sums[:, at["tokens"]], sums[:, at["logits"]]
        time = torch.cat([drawn_time(call.rng_keys) for call in calls])
        is_in_bin = (time * TIME_BINS).long().clamp(0, TIME_BINS - 1).unsqueeze(-1) == torch.arange(
            TIME_BINS, device=device
        )
        one = torch.ones_like(tokens)
        by_bin = is_in_bin.unsqueeze(-1) * torch.cat((one, tokens, logits), dim=-1).unsqueeze(1)
        rows = torch.cat(
            (sums, logits.square().sum(dim=-1, keepdim=True) / tokens, one, by_bin.flatten(1)), dim=-1
        )
        place = [(call.layer * latent_steps + call.latent_step - 1, len(call.rng_keys)) for call in calls]
        number, repeats = (torch.tensor(each, device=device) for each in zip(*place, strict=True))
        table.index_add_(0, number.repeat_interleave(repeats), rows)
    return table.view(num_layers, latent_steps, width)
