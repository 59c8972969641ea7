"""How much of the machine's matrix-product rate a training step reaches, beside diffusers, by width, tokens and precision.

    python tools/benchmark_widths.py [--widths 768 1536] [--tokens 256 1024] [--precisions fp32 bf16] [--profile] [--record width]

A dense MM-DiT (heads of 64, 77 tokens of text) takes the same step four ways, in turns: this project's trainer and diffusers'
SD3Transformer2DModel with PyTorch's AdamW, each eager and through torch.compile. Beside them the same process measures the
product of the MLP's first layer alone: *of the rate* is FLOPs of the step (matrix products only) over what that product
reaches. Below a row stand the ratios to diffusers' steps and their goals (``tools/benchmark_goals.py``). --profile says where the time of this project's eager step goes.
"""

import argparse
import sys
from dataclasses import replace

import ledger
import torch
from benchmark_goals import compiled_goal, dense_goal, judged
from benchmark_step import DEPENDS_ON, Step, diffusers_step, measure, megatron_step, product_rate
from torch._inductor.exc import InductorError
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from rmoe_megatron.config.model import ModelConfig
from rmoe_megatron.config.run import DataConfig, Device, OptimizerConfig, Precision, RunConfig, TrainingConfig
from rmoe_megatron.distributed.device import select_device
from rmoe_megatron.distributed.process_groups import process_groups
from rmoe_megatron.distributed.processor import bf16_is_fast, describe_processor
from rmoe_megatron.model.flops import training_flops_per_sample

HEAD_DIM, TEXT_LENGTH, WAYS = 64, 77, ("eager", "compiled", "diffusers eager", "diffusers compiled")
# Of an operation's name, in this order; what is none of them passes over memory once and computes little.
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("scaled_dot_product",),
    "optimizer": ("fused_adamw", "_foreach", "linalg_vector_norm"),
}


def make_config(arguments: argparse.Namespace, width: int, tokens: int, precision: Precision) -> RunConfig:
    """Return the run of one row."""
    side = int(tokens**0.5)
    model = ModelConfig(
        sample_size=2 * side, patch_size=2, in_channels=16, num_layers=arguments.layers, hidden_size=width,
        num_attention_heads=width // HEAD_DIM, qk_norm=True, text_length=TEXT_LENGTH, text_hidden_size=1024,
        pooled_size=1024, pos_embed_max_size=side,
    )  # fmt: skip
    batch = max(1, arguments.batch_tokens // tokens)
    return RunConfig(
        run_dir="unused", precision=precision, device=Device[arguments.device], model=model, data=DataConfig(train="unused"),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=1),
        training=TrainingConfig(steps=10_000, micro_batch_size=batch, global_batch_size=batch),
    )  # fmt: skip


def steps_of(config: RunConfig, device: torch.device) -> dict[str, Step]:
    """Return the step in all ways."""
    compiled = replace(config, training=replace(config.training, compile=True))
    return dict(
        zip(
            WAYS,
            (
                megatron_step(config, device),
                megatron_step(compiled, device),
                diffusers_step(config, device),
                diffusers_step(config, device, compile=True),
            ),
            strict=True,
        )
    )


def runs(step: Step) -> bool:
    """Take a step; returns False if PyTorch's compiler writes code for it that a C++ compiler refuses."""
    try:
        step(0)
    except InductorError as error:
        tqdm.write(str(error).splitlines()[0], file=sys.stderr)
        return False
    return True


def where_time_goes(step: Step) -> dict[str, float]:
    """Return the share of each kind of operation in the time of a step on the CPU or the GPU, by PyTorch's profiler."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        step(99)
    shares = dict.fromkeys((*KINDS, "the rest"), 0.0)
    for event in recorded.key_averages():
        kind = next(
            (kind for kind, names in KINDS.items() if any(name in event.key for name in names)), "the rest"
        )
        shares[kind] += event.self_device_time_total or event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: spent / total for kind, spent in shares.items()}


def ratios(medians: dict[str, float], width: int, precision: Precision, device: torch.device) -> list[str]:
    """Return a line for our step over diffusers', eager and compiled, with the goal of this device."""
    is_cpu, found = device.type == "cpu", []
    goals = {
        "eager": dense_goal(width, precision, bf16_is_fast()) if is_cpu else None,
        "compiled": compiled_goal(precision, bf16_is_fast()) if is_cpu else None,
    }
    for way, goal in goals.items():
        if way in medians and f"diffusers {way}" in medians:
            found.append(
                f"{way} / diffusers {way}: {judged(medians[way] / medians[f'diffusers {way}'], goal)}"
            )
    return found


def figures_of(
    config: RunConfig, rate: float, medians: dict[str, float], of_rate: dict[str, float]
) -> dict[str, ledger.Figure]:
    """Return what the ledger keeps of a row; a way that did not compile is left out.

    Args:
        rate: FLOPs a second of the matrix product alone.
        medians: seconds of a step by way.
        of_rate: the share of the rate that each way reaches.
    """
    model = config.model
    found: dict[str, ledger.Figure] = {
        "width": model.hidden_size,
        "tokens": (model.sample_size // model.patch_size) ** 2,
        "batch": config.training.micro_batch_size,
        "precision": config.precision.value,
        "product_gflops": rate / 1e9,
    }
    for way, seconds in medians.items():
        name = way.replace(" ", "_")
        found |= {f"{name}_ms": seconds * 1e3, f"{name}_of_rate": of_rate[way]}
    for way in ("eager", "compiled"):
        if way in medians and f"diffusers {way}" in medians:
            found[f"{way}_over_diffusers"] = medians[way] / medians[f"diffusers {way}"]
    return found


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 1536])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024], help="of an image")
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens of all images of a step")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--profile", action="store_true")
    ledger.add_arguments(parser)
    arguments = parser.parse_args()
    where = select_device(Device[arguments.device])
    print(
        f"{describe_processor(where)}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.layers} blocks"
    )
    print(
        f"| width | tokens | batch | precision | product GFLOP/s |{' | '.join(f' {way} ms (of the rate)' for way in WAYS)} |"
    )
    print("|" + "---|" * (5 + len(WAYS)))
    rows = [
        (w, t, Precision[p]) for w in arguments.widths for t in arguments.tokens for p in arguments.precisions
    ]
    for width, tokens, precision in tqdm(rows, desc="rows", unit="row"):
        config = make_config(arguments, width, tokens, precision)
        batch = config.training.micro_batch_size
        with process_groups(config) as device:
            rate = product_rate(config, device, arguments.repeats)
            steps = {way: step for way, step in steps_of(config, device).items() if runs(step)}
            medians = measure(steps, arguments.repeats, device)
            rate = max(rate, product_rate(config, device, arguments.repeats))
            shares = where_time_goes(steps["eager"]) if arguments.profile else {}
        flops = training_flops_per_sample(config) * batch
        of_rate = {way: flops / seconds / rate for way, seconds in medians.items()}
        cells = [
            f"{medians[way] * 1e3:.0f} ({of_rate[way]:.0%})" if way in medians else "does not compile"
            for way in WAYS
        ]
        print(
            f"| {width} | {tokens} | {batch} | {precision.value} | {rate / 1e9:.0f} | {' | '.join(cells)} |",
            flush=True,
        )
        for line in ratios(medians, width, precision, where):
            print(f"  {line}", flush=True)
        figures = figures_of(config, rate, medians, of_rate)
        row = f"{width}-{tokens}-{precision.value}"
        ledger.write(arguments, figures, (*DEPENDS_ON, "tools/benchmark_widths.py"), where, row)
        if shares:
            print(
                "  eager: " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()), flush=True
            )


if __name__ == "__main__":
    main()
