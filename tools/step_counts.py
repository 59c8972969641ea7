"""Counts what a training step of each shipped configuration is made of, and holds it to the record in tools/step_counts.json.

    python tools/step_counts.py             # exit code 1, and every difference, if anything is not as recorded
    python tools/step_counts.py --renew     # record the counts of now, and say what has changed

Kernels, copies, FLOPs, bytes and messages come from `rmoe plan`'s dry run: no value is computed and no time measured, so that the
counts are the same on every machine and a difference is a change of the code. Large models are counted with four of their blocks, two
of them with modules, at full width. A record is renewed in the commit that means to change it, which says why.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from ledger import ROOT

from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.run import Precision
from rmoe_megatron.files import atomic
from rmoe_megatron.planning.dry_run import RankUsage, dry_run

RECORD = ROOT / "tools" / "step_counts.json"
FOUR_BLOCKS = ["model.num_layers=4", "recurrence.layers=[1,3]"]
# The ranks that each is for, and what is changed to count it.
CONFIGURATIONS: dict[str, tuple[int, list[str]]] = {
    "shapes_tiny": (1, []),
    "shapes_small": (1, []),
    "shapes_dit": (1, []),
    "mazes_quick": (1, []),
    "mazes_full": (1, []),
    "dit_xl2_recurrent": (8, FOUR_BLOCKS),
    "sd3_medium_recurrent": (8, FOUR_BLOCKS),
    "imagenet_dit_xl_2": (16, FOUR_BLOCKS),
    "t2i_2b": (32, FOUR_BLOCKS),
    "t2i_8b_moe": (128, FOUR_BLOCKS),
}
# Leaves of the record are numbers, and versions.
type Counts = dict[str, Counts | int | str]


def counts_of(usage: RankUsage) -> Counts:
    """Return what a step of a rank is made of: kernels by pass and kind, messages by kind, and bytes of memory."""
    passes: dict[str, Counter[str]] = {}
    for operation, count in usage.operations.items():
        counted = passes.setdefault(operation.phase, Counter())
        counted[f"{operation.kind} kernels"] += count
        counted["FLOPs"] += count * operation.flops
        counted["bytes"] += count * operation.bytes
    messages: dict[str, Counter[str]] = {}
    for message, count in usage.collectives.items():
        if len(message.ranks) > 1:
            counted = messages.setdefault(message.kind, Counter())
            counted["messages"] += count
            counted["bytes"] += count * message.bytes
    return {
        **{phase: dict(sorted(counted.items())) for phase, counted in sorted(passes.items())},
        **{kind: dict(sorted(counted.items())) for kind, counted in sorted(messages.items())},
        "memory": {"kept bytes": usage.peak - usage.activations, "activation bytes": usage.activations},
    }


def count_all() -> Counts:
    """Return the counts of all configurations, and the versions that they hold for."""
    found: Counts = {"versions": {name: version(name) for name in ("torch", "megatron-core")}}
    for name, (ranks, overrides) in CONFIGURATIONS.items():
        config = load_config(ROOT / "configs" / f"{name}.yaml", ["data.train=unused", *overrides])
        if config.precision is Precision.auto:
            config = replace(config, precision=Precision.bf16)
        print(f"counting {name}", file=sys.stderr, flush=True)
        found[name] = counts_of(dry_run(config, 0, ranks))
    return found


def differences(recorded: Counts, counted: Counts, where: str = "") -> Iterator[str]:
    """Yield every leaf that differs, in words."""
    for name in sorted(recorded.keys() | counted.keys()):
        before, now = recorded.get(name), counted.get(name)
        path = f"{where} {name}".strip()
        if isinstance(before, dict) or isinstance(now, dict):
            mine, theirs = (each if isinstance(each, dict) else {} for each in (before, now))
            yield from differences(mine, theirs, path)
        elif before != now:
            more = f" ({now - before:+,})" if isinstance(before, int) and isinstance(now, int) else ""
            yield f"{path}: {_shown(before)} recorded, {_shown(now)} counted{more}"


def _shown(value: Counts | int | str | None) -> str:
    return f"{value:,}" if isinstance(value, int) else "nothing" if value is None else str(value)


def main(record: Path = RECORD) -> None:
    """Count, and compare or renew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--renew", action="store_true", help="record the counts of now")
    renew = parser.parse_args().renew
    recorded = json.loads(record.read_text()) if record.exists() else {}
    counted = count_all()
    changed = list(differences(recorded, counted))
    print("\n".join(changed) or "Every count is as recorded.")
    if renew:
        atomic.write(record, json.dumps(counted, indent=1) + "\n")
    elif changed:
        print("Undo the change, or record it: python tools/step_counts.py --renew")
        sys.exit(1)


if __name__ == "__main__":
    main()
