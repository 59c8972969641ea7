"""Does a device compute what the CPU computes: a training step, and the products of the modules.

The reference step runs in a process of its own, which sees no GPU: what makes Megatron-Core run on the CPU replaces calls of
``torch.cuda`` for the whole process (:func:`rmoe_megatron.distributed.megatron_on_cpu.use_cpu`).
"""

import argparse
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from benchmark_step import make_batch, make_engine
from gpu_check_workplace import (
    Figures,
    Skipped,
    Workplace,
    parity_model,
    recurrence_of,
    require_recipe,
    require_transformer_engine,
    run_config,
    with_backend,
    with_fp8,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmoe_megatron.config.run import Backend, Fp8Recipe, Precision, RunConfig
from rmoe_megatron.distributed.device import PARAMS_DTYPE, synchronize
from rmoe_megatron.distributed.process_groups import process_groups
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.model.recurrence.experts import Experts, Packing

CPU = torch.device("cpu")
BATCH = 4
TOLERANCES = {
    "fp32": 2e-4,
    "bf16": 0.1,
    "fp8": 0.3,
}  # of all gradients together, relative; TF32 would not pass as fp32
WORST = 10.0  # times as much for a single tensor, which may be a sum that nearly cancels
# Rounding differs from kernel to kernel: this many times the error that the CPU makes in the same precision is no fault.
SLACK = 2.0

REFERENCES = (Precision.fp32, Precision.bf16)

Step = dict[str, Tensor]  # loss, grad_norm and every gradient, as float32 on the CPU


def parity_config(precision: Precision, device: torch.device, small: bool) -> RunConfig:
    """Return the run whose step is compared: recurrent, so that gates and modules take part."""
    config = run_config(parity_model(small), precision, device, BATCH)
    recurrence = recurrence_of(num_modules=4, steps=2, small=True)
    return replace(config, recurrence=replace(recurrence, layers=[1]))


def randomise(modules: torch.nn.ModuleList) -> None:
    """Give a model weights that depend on nothing but names and shapes."""
    with torch.no_grad():
        for name, parameter in modules.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.copy_(1 + values if "norm" in name and name.endswith("weight") else values)


def training_step(config: RunConfig, device: torch.device) -> Step:
    """Take one step from weights and a batch that depend on nothing but names, shapes and the seed."""
    modules = build_chunks(config)
    randomise(modules)
    engine = make_engine(config, modules.to(device), device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        batch = make_batch(config, 0, CPU).to(device)
    step: Step = {}

    def read_gradients() -> None:
        for name, parameter in engine.modules.named_parameters():
            gradient = parameter.main_grad  # type: ignore[attr-defined]
            step[name] = gradient.detach().to(CPU, torch.float32, copy=True).contiguous()

    result = engine.step([batch], read_gradients)
    step["loss"], step["grad_norm"] = torch.tensor([result.loss]), torch.tensor([result.grad_norm])
    return step


def compare(step: Step, reference: Step) -> Figures:
    """Return relative errors: of the loss, the gradients' norm, all gradients as one vector, and the worst tensor.

    A tensor's error is relative to its own norm, or to a thousandth of all gradients' if that is more: the gradients of the keys'
    biases are zero but for rounding.
    """
    if step.keys() != reference.keys():
        names = sorted(step.keys() ^ reference.keys())
        raise ValueError(f"{len(names)} gradients are in one of the steps only, the first is {names[0]}")
    scalars = ("loss", "grad_norm")
    names = [name for name in reference if name not in scalars]
    differences = {name: float((step[name] - reference[name]).norm()) for name in names}
    norms = {name: float(reference[name].norm()) for name in names}
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    errors = {name: differences[name] / max(norms[name], 1e-3 * whole) for name in names}
    worst = max(errors, key=errors.__getitem__)
    return {
        **{
            f"{name}_error": float((step[name] - reference[name]).abs() / reference[name].abs())
            for name in scalars
        },
        "gradient_error": sum(difference**2 for difference in differences.values()) ** 0.5 / whole,
        "worst_gradient_error": errors[worst],
        "worst_gradient": worst,
        "gradients": len(names),
    }


def cpu_steps(workplace: Workplace) -> dict[str, Step]:
    """Return the CPU's step in every precision; computed once, in another process."""
    if "cpu_steps" not in workplace.measured:
        files = {each.value: workplace.folder / f".cpu_step_{each.value}.safetensors" for each in REFERENCES}
        command = [sys.executable, __file__, str(workplace.folder), *(["--small"] if workplace.small else [])]
        # Its modules are where this process has found them.
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        try:
            done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
            if done.returncode != 0:
                lines = done.stderr.strip().splitlines() or ["it said nothing"]
                raise RuntimeError(f"the CPU's step ended with exit code {done.returncode}: {lines[-1]}")
            workplace.measured["cpu_steps"] = {name: load_file(path) for name, path in files.items()}
        finally:
            for path in files.values():
                path.unlink(missing_ok=True)
    return workplace.measured["cpu_steps"]


def write_cpu_steps(folder: Path, small: bool) -> None:
    """Write the CPU's step in every precision, one file each."""
    with process_groups(parity_config(Precision.fp32, CPU, small)):
        for precision in REFERENCES:
            step = training_step(parity_config(precision, CPU, small), CPU)
            save_file(step, folder / f".cpu_step_{precision.value}.safetensors")


def parity_fp32(workplace: Workplace) -> Figures:
    """Hold the device's step in fp32 to the CPU's."""
    torch.backends.cudnn.allow_tf32 = (
        False  # PyTorch's default is TF32 for convolutions, of which patches are one
    )
    reference = cpu_steps(workplace)["fp32"]
    step = training_step(parity_config(Precision.fp32, workplace.device, workplace.small), workplace.device)
    figures = compare(step, reference) | {"against": "fp32 on the CPU"}
    if workplace.device.type == "cpu":
        figures["against"] = (
            "fp32 on the CPU in another process: it shows that a step can be repeated, no more"
        )
    return within(figures, TOLERANCES["fp32"])


def parity_bf16(workplace: Workplace) -> Figures:
    """Hold the device's error in bf16, from fp32 on the CPU, to the error that the CPU makes in bf16."""
    references = cpu_steps(workplace)
    step = training_step(parity_config(Precision.bf16, workplace.device, workplace.small), workplace.device)
    of_cpu = compare(references["bf16"], references["fp32"])
    figures = compare(step, references["fp32"]) | {
        "gradient_error_of_cpu_bf16": of_cpu["gradient_error"],
        "against": "fp32 on the CPU",
    }
    tolerance = min(TOLERANCES["bf16"], SLACK * of_cpu["gradient_error"])
    return within(figures, tolerance, of_cpu["worst_gradient_error"])


def parity_transformer_engine(workplace: Workplace) -> Figures:
    """Hold the step of Transformer Engine's layers to that of Megatron-Core's own, both in bf16 on the device."""
    require_transformer_engine(workplace)
    config = parity_config(Precision.bf16, workplace.device, workplace.small)
    theirs, ours = (
        training_step(with_backend(config, backend), workplace.device)
        for backend in (Backend.transformer_engine, Backend.local)
    )
    return within(compare(theirs, ours), TOLERANCES["bf16"])


def parity_fp8(workplace: Workplace, recipe: Fp8Recipe) -> Figures:
    """Hold the error of a step in FP8, from bf16 on the device, to that of the recipe in ordinary arithmetic."""
    require_transformer_engine(workplace)
    require_recipe(workplace, recipe)
    return fp8_errors(workplace, recipe, Precision.fp8)


def fp8_errors(workplace: Workplace, recipe: Fp8Recipe, precision: Precision) -> Figures:
    """Return how far a step in ``precision`` is from bf16, beside the same in emulated FP8."""
    config = parity_config(Precision.bf16, workplace.device, workplace.small)
    bf16, emulated, found = (
        training_step(each, workplace.device)
        for each in (
            config,
            with_fp8(config, recipe, Precision.fp8_emulated),
            with_fp8(config, recipe, precision),
        )
    )
    of_emulated = compare(emulated, bf16)
    figures = compare(found, bf16) | {"gradient_error_of_emulated": of_emulated["gradient_error"]}
    tolerance = min(TOLERANCES["fp8"], SLACK * of_emulated["gradient_error"])
    return within(figures, tolerance, of_emulated["worst_gradient_error"])


def within(figures: Figures, tolerance: float, worst_of_reference: float = 0.0) -> Figures:
    """Return the figures with their tolerances, or raise if one of them is above its own.

    Args:
        tolerance: of the loss and of all gradients together.
        worst_of_reference: error of the worst tensor where the precision is the same but the arithmetic is trusted.
    """
    worst = max(WORST * tolerance, SLACK * worst_of_reference)
    tolerances = {"loss_error": tolerance, "gradient_error": tolerance, "worst_gradient_error": worst}
    for name, bound in tolerances.items():
        if not figures[name] <= bound:  # also NaN
            raise ValueError(
                f"{name} is {figures[name]:.2g}, more than {bound:.2g} (the worst is {figures['worst_gradient']})"
            )
    return figures | {"tolerance": tolerance, "worst_tolerance": worst}


def grouped_products(workplace: Workplace, precision: Precision) -> Figures:
    """Hold the modules' grouped matrix products to the packed ones, forward and backward, of both kinds of modules."""
    figures: Figures = {}
    for name, rank in (("low_rank", 8 if workplace.small else 128), ("full_rank", None)):
        figures |= {
            f"{name}_{key}": value
            for key, value in _grouped_against_packed(workplace, precision, rank).items()
        }
    return figures


def _grouped_against_packed(workplace: Workplace, precision: Precision, rank: int | None) -> Figures:
    """Return errors from packed products in float32, and the times of both."""
    device, dtype = workplace.device, PARAMS_DTYPE[precision]
    hidden, tokens = (64, 200) if workplace.small else (1536, 16_384)
    model = replace(parity_model(workplace.small), hidden_size=hidden, num_attention_heads=hidden // 32)
    recurrence = replace(recurrence_of(num_modules=5, steps=2, small=True), rank=rank)
    config = replace(run_config(model, precision, device, 1), recurrence=recurrence)
    chunks = build_chunks(config, initialise=False)  # the modules are drawn even so
    experts = next(module for module in chunks.modules() if isinstance(module, Experts)).to(device)
    generator = torch.Generator().manual_seed(0)
    inputs, output_gradient = (
        torch.randn(tokens, width, generator=generator).to(device, dtype) for width in (hidden, 3 * hidden)
    )
    counts = torch.tensor(
        [tokens // 2, 0, tokens // 4, tokens // 8, tokens - tokens * 7 // 8]
    )  # one has none
    packing = Packing(counts)
    rows = packing.rows_of_sorted(counts, tokens, device)

    def packed(experts: Experts, tokens: Tensor) -> Tensor:
        return packing.unpack(experts._project_packed(packing.pack(tokens, rows)), rows)

    def grouped(experts: Experts, tokens: Tensor) -> Tensor:
        return experts._project_grouped(tokens, counts)

    reference = _values_and_gradients(packed, experts.float(), inputs.float(), output_gradient)
    experts.to(dtype)
    try:
        found = _values_and_gradients(grouped, experts, inputs, output_gradient)
    except (RuntimeError, NotImplementedError) as error:
        if any(word in str(error).lower() for word in ("dtype", "bf16", "bfloat16")):
            raise Skipped(
                f"PyTorch {torch.__version__} has no grouped_mm of {dtype} on {device.type}"
            ) from error
        raise
    of_packed = _error(_values_and_gradients(packed, experts, inputs, output_gradient), reference)
    figures = {"error": _error(found, reference), "error_of_packed": of_packed}
    tolerance = max(SLACK * of_packed, 1e-5)
    if not figures["error"] <= tolerance:
        raise ValueError(f"grouped products are {figures['error']:.2g} off, packed ones {of_packed:.2g}")
    for name, project in (("grouped", grouped), ("packed", packed)):
        action = partial(_values_and_gradients, project, experts, inputs, output_gradient)
        figures[f"{name}_seconds"] = _seconds(action, device)
    return figures


def _values_and_gradients(
    project: Callable[[Experts, Tensor], Tensor], experts: Experts, inputs: Tensor, output_gradient: Tensor
) -> list[Tensor]:
    """Return output, gradient of the tokens and gradients of the weights."""
    tokens = inputs.detach().requires_grad_()
    output = project(experts, tokens)
    gradients = torch.autograd.grad(
        output, [tokens, *experts.parameters()], output_gradient.to(output.dtype), allow_unused=False
    )
    return [output.detach(), *gradients]


def _error(found: list[Tensor], reference: list[Tensor]) -> float:
    """Return the largest relative error of the tensors."""
    return max(
        float((mine.float() - theirs).norm() / theirs.norm())
        for mine, theirs in zip(found, reference, strict=True)
    )


def _seconds(action: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        action()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def main() -> None:
    """Write the CPU's steps for :func:`cpu_steps`."""
    parser = argparse.ArgumentParser(description=write_cpu_steps.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    write_cpu_steps(arguments.folder, arguments.small)


if __name__ == "__main__":
    main()
