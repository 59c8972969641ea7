"""When a gate needs a look: a module that hardly any token or nearly every token gets, certainty, a choice by the timestep alone."""

import re

LEAST_SHARE, MOST_SHARE = 0.01, 0.9
LEAST_ENTROPY = 0.02  # of 1, where all modules are equally likely
MOST_BY_TIMESTEP = 0.8  # of the variance of the logits
SHOWN = 3


def gate_alarms(metrics: dict[str, float], num_modules: int) -> dict[str, str]:
    """Return a clause for every gate that needs a look, by the name of the metric that says so.

    An even share of many modules is small: a module has too little if it has less than a hundredth of the tokens and than a fifth of an even
    share.

    Args:
        metrics: what :func:`rmoe_megatron.engine.gate_health.gate_health` returns.
    """
    least = min(LEAST_SHARE, 1 / (5 * num_modules))
    found = {}
    for name, value in metrics.items():
        if (share := re.fullmatch(r"module_share_(\d+)_(\d+)_(\d+)", name)) is not None:
            layer, step, module = share.groups()
            if not least <= value <= MOST_SHARE:
                found[name] = (
                    f"module {module} of layer {layer} gets {value:.1%} of the tokens in latent step {step}"
                )
        elif (gate := re.fullmatch(r"(gate_entropy|gate_by_timestep)_(\d+)_(\d+)", name)) is not None:
            kind, layer, step = gate.groups()
            where = f"the gate of layer {layer} in latent step {step}"
            if kind == "gate_entropy" and value < LEAST_ENTROPY:
                found[name] = f"{where} is nearly certain of every token (entropy {value:.3f} of 1)"
            if kind == "gate_by_timestep" and value > MOST_BY_TIMESTEP:
                found[name] = f"{where} looks at the timestep ({value:.0%} of its logits' variance)"
    return found


class GateAlarms:
    """Says once what needs a look, and again only if it was well in between."""

    def __init__(self, num_modules: int) -> None:
        self.num_modules = num_modules
        self._known: set[str] = set()

    def line(self, metrics: dict[str, float]) -> str | None:
        """Return one line about what is new among the alarms, None if nothing is."""
        alarms = gate_alarms(metrics, self.num_modules)
        new = [clause for name, clause in alarms.items() if name not in self._known]
        self._known = set(alarms)
        if not new:
            return None
        more = f"; and {len(new) - SHOWN} more" if len(new) > SHOWN else ""
        return f"WARNING: {'; '.join(new[:SHOWN])}{more}. See `Gates` on the page of training."
