"""What the gates of a model decide in one optimizer step, put down as sums over the tokens of each sample."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GateCall:
    """One decision of a gate for all tokens that this rank has of a micro-batch.

    Attributes:
        layer: the number of the block, from 0.
        latent_step: from 1.
        rng_keys: int64 [B], one key of the counter-based random numbers for every sample.
        sums: float64 [B, 5 + 2 M] over the tokens of a sample, in the columns that :func:`columns` names. The logits in them are without
            noise and without their mean over the experts, which the softmax does not see.
    """

    layer: int
    latent_step: int
    rng_keys: Tensor
    sums: Tensor


def columns(num_modules: int) -> dict[str, slice]:
    """Return where each kind of sum is in the columns of :attr:`GateCall.sums`.

    ``tokens``: their number; ``squares``: of the logits; ``entropy``: of softmax(logits), in nats; ``margin``: of the largest logit to the
    second; ``switched``: tokens whose largest logit was another expert's in the latent step before; ``picked``: tokens for which each
    expert was picked; ``logits``: of each expert.
    """
    widths = {
        "tokens": 1, "squares": 1, "entropy": 1, "margin": 1, "switched": 1, "picked": num_modules, "logits": num_modules,
    }  # fmt: skip
    found, start = {}, 0
    for name, width in widths.items():
        found[name] = slice(start, start + width)
        start += width
    return found


class GateWatch:
    """Collects the calls of the gates that it is given to (:attr:`rmoe_megatron.model.recurrence.gate.Gate.watch`).

    The calls of a rank are in the order of the forward passes, the same on every rank that has a part of the same tokens. What
    recomputation does again in the backward pass is not counted again.
    """

    def __init__(self) -> None:
        self.calls: list[GateCall] = []
        self._largest: dict[int, Tensor] = {}  # of each layer: which logit was the largest in its last call

    @torch.no_grad()
    def see(self, layer: int, latent_step: int, rng_keys: Tensor, logits: Tensor, picked: Tensor) -> None:
        """Put down a call.

        Args:
            layer: from 0.
            latent_step: from 1.
            rng_keys: int64 [B].
            logits: without noise, float32 [S, B, M].
            picked: bool [S, B, M].
        """
        # PyTorch gives a number to every backward pass; outside of one it is -1.
        if torch._C._current_graph_task_id() != -1:
            return
        values, modules = logits.topk(2, dim=-1)
        largest = modules[..., 0]
        before = self._largest.get(layer) if latent_step > 1 else None
        switched = torch.zeros_like(largest) if before is None else largest != before
        self._largest[layer] = largest
        centred = logits - logits.mean(dim=-1, keepdim=True)
        log_probability = torch.log_softmax(logits, dim=-1)
        scalars = (
            torch.ones_like(values[..., 0]),
            centred.square().sum(dim=-1),
            -(log_probability.exp() * log_probability).sum(dim=-1),
            values[..., 0] - values[..., 1],
            switched.float(),
        )
        of_tokens = torch.cat((torch.stack(scalars, dim=-1), picked.float(), centred), dim=-1)
        self.calls.append(GateCall(layer, latent_step, rng_keys, of_tokens.sum(dim=0, dtype=torch.float64)))
