"""Plans the shipped configurations and records what they need, for the tables of the pages: nothing of it is measured.

    python tools/plan_table.py                # every row
    python tools/plan_table.py sd35_medium    # the rows whose name contains this

A row is what `rmoe plan` says: memory is counted, time is an estimate (rmoe_megatron/planning/README.md). Its record in
tools/records/calculated holds that command; tools/figures.py writes it into the pages, and says when the code has changed.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import ledger
from ledger import Figure, Machine

from rmoe_megatron.config.layout_checks import data_parallel_size
from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.validation import validate
from rmoe_megatron.planning.hardware import find_hardware
from rmoe_megatron.planning.plan import MEMORY_KINDS, USABLE, Plan, make_plan

# What a plan follows from, besides the configuration.
CODE = (
    "rmoe_megatron/planning",
    "rmoe_megatron/model",
    "rmoe_megatron/engine/megatron",
    "rmoe_megatron/diffusion",
)
NOWHERE = Machine(kind="calculated", processor="none", cores=0, threads=0)
SD35 = ("model.preset=sd3.5_medium",)  # in place of the base, which brings it
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Row:
    """A configuration on some accelerators.

    Attributes:
        name: of its record; rows of a table are in the order of their names.
        model: what the table calls it.
    """

    name: str
    model: str
    config: str
    gpus: int
    gpu: str
    overrides: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The command that says what the row says."""
        return " ".join(
            ("rmoe plan", self.config, *self.overrides, f"--gpus {self.gpus}", f"--gpu {self.gpu}")
        )


ROWS = (
    Row("1-sd35_medium_lora-a100", "SD3.5-medium, LoRA", "configs/sd35_medium_lora.yaml", 1, "a100", SD35),
    Row("2-sd35_medium_lora-h100", "SD3.5-medium, LoRA", "configs/sd35_medium_lora.yaml", 1, "h100", SD35),
    Row(
        "3-sd35_medium_recurrent-h100",
        "SD3.5-medium, frozen + recurrence",
        "configs/sd35_medium_recurrent.yaml",
        1,
        "h100",
        SD35,
    ),
    Row("4-sd35_medium_full-h100", "SD3.5-medium, all weights", "configs/sd35_medium_full.yaml", 1, "h100", SD35),
    Row("5-sd3_medium_recurrent-h100", "SD3-medium, the paper's", "configs/sd3_medium_recurrent.yaml", 8, "h100"),
    Row("6-imagenet_dit_xl_2-h100", "DiT-XL/2, recurrent, from scratch", "configs/imagenet_dit_xl_2.yaml", 16, "h100"),
    Row("7-t2i_2b-h100", "MM-DiT of 2 billion, recurrent", "configs/t2i_2b.yaml", 32, "h100"),
    Row("8-t2i_8b_moe-h100", "MM-DiT of 8 billion, 16 modules", "configs/t2i_8b_moe.yaml", 128, "h100"),
)  # fmt: skip


def main() -> None:
    """Plan and record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", default="", help="of the names of the rows to plan")
    parser.add_argument(
        "--records", type=Path, default=ledger.RECORDS, help="another folder than the ledger's"
    )
    arguments = parser.parse_args()
    for row in ROWS:
        if arguments.part in row.name:
            record = ledger.make(row.command, NOWHERE, planned(row), (*CODE, row.config))
            print(f"recorded in {ledger.save(arguments.records, f'plan-{row.name}', record)}", flush=True)


def planned(row: Row) -> dict[str, Figure]:
    """Return the figures of a row; bytes as GB, the time of the configuration's own steps in minutes and days."""
    config = load_config(ledger.ROOT / row.config, list(row.overrides))
    validate(config, row.gpus)
    return figures_of(make_plan(config, row.gpus, find_hardware(row.gpu), GPUS_PER_NODE), row.model)


def figures_of(plan: Plan, model: str) -> dict[str, Figure]:
    """Return what the tables say of a plan."""
    parallel, training = plan.config.parallel, plan.config.training
    fullest = max(plan.stages, key=lambda stage: stage.peak)
    sizes = {
        "data": data_parallel_size(parallel, plan.ranks),
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "expert": parallel.expert_model_parallel_size,
    }
    layout = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one rank"
    seconds = plan.seconds.total * training.steps
    return {
        "model": model,
        "gpus": f"{plan.ranks} x {plan.hardware.name}",
        "layout": layout,
        "micro_batch": training.micro_batch_size,
        "global_batch": training.global_batch_size,
        "recompute": training.recompute.value,
        "fits": "fits" if plan.fits else "does not fit",
        **{kind: getattr(fullest, kind) / 1e9 for kind in MEMORY_KINDS},
        "peak": fullest.peak / 1e9,
        "usable": USABLE * plan.hardware.memory / 1e9,
        "seconds": plan.seconds.total,
        "samples_per_second": plan.samples_per_second,
        "steps": training.steps,
        "minutes": seconds / 60,
        "days": seconds / 86400,
    }


if __name__ == "__main__":
    main()
