"""Memory and time of encoding pictures, importing, running, fine-tuning and exporting a large model with random weights on the CPU.

    python tools/benchmark_memory.py FOLDER [--preset sd3_medium] [--stages import forward] [--record memory]

FOLDER needs room for three copies of the weights in bf16 (SD3-medium: 13 GB). Every stage runs in a process of its own;
*anonymous* is the peak of memory that is not a mapped file, which is what has to fit into the machine. ``--stages`` names those that
are wanted; ``import`` needs what ``weights`` wrote into FOLDER, and ``forward``, ``fine_tune`` and ``export`` what ``import`` wrote.
"""

import argparse
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ledger
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention import JointTransformerBlock
from tensor_memory import peak_tensor_bytes
from tqdm import tqdm

from rmoe_megatron.config.model import Architecture, ModelConfig, RecurrenceConfig
from rmoe_megatron.config.presets import PRESETS
from rmoe_megatron.config.run import (
    DataConfig,
    FineTuningConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    RunConfig,
    TrainingConfig,
)
from rmoe_megatron.conversion.export import export_run
from rmoe_megatron.conversion.importing import import_diffusers
from rmoe_megatron.data.batch import Batch, TextConditions
from rmoe_megatron.diffusion.loss import DiffusionLoss, model_arguments
from rmoe_megatron.distributed.process_groups import process_groups
from rmoe_megatron.encoders.autoencoder import PIXELS_AT_ONCE, encode_images
from rmoe_megatron.engine.registry import build_engine
from rmoe_megatron.model.build import build_chunks
from rmoe_megatron.pretrained.architecture import empty_transformer
from rmoe_megatron.pretrained.safetensors_folder import write_model
from rmoe_megatron.training.fine_tuning import start_from_base

FINE_TUNING_SIZE = 32  # latent side of the training step: images of 256 pixels


def make_config(preset: str, folder: Path) -> RunConfig:
    """Return the paper's fine-tuning of a preset on the imported weights."""
    values = PRESETS[preset] | {"architecture": Architecture[PRESETS[preset]["architecture"]]}
    return RunConfig(
        run_dir=str(folder / "run"),
        precision=Precision.bf16,
        model=ModelConfig(**values),
        recurrence=RecurrenceConfig(layers=[4, 8, 12], num_modules=2, steps=2, rank=128),
        fine_tuning=FineTuningConfig(base=str(folder / "imported")),
        data=DataConfig(train=""),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        training=TrainingConfig(steps=10, micro_batch_size=1, global_batch_size=1),
    )


def make_weights(config: RunConfig, folder: Path) -> dict[str, float]:
    """Write random weights as a diffusers folder."""
    transformer = empty_transformer(replace(config, recurrence=None), torch.bfloat16)
    shapes = {name: tensor.shape for name, tensor in transformer.state_dict().items()}

    def read(name: str) -> torch.Tensor:
        return torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02)

    (folder / "model").mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(shapes), desc="random weights", unit="tensor")

    def progress(done: int, _: int) -> None:
        bar.update(done - bar.n)

    write_model(transformer, read, folder / "model", progress=progress)
    return {"parameters": float(sum(shape.numel() for shape in shapes.values()))}


def import_weights(config: RunConfig, folder: Path) -> dict[str, float]:
    """Import the folder."""
    import_diffusers(folder / "model", folder / "imported", config.model.text_length, ParallelConfig())
    return {}


def export_weights(config: RunConfig, folder: Path) -> dict[str, float]:
    """Export it again."""
    export_run(folder / "imported", folder / "exported")
    return {}


def make_batch(config: RunConfig) -> Batch:
    """Return one random sample."""
    model = config.model
    text = TextConditions(
        torch.randn(1, model.text_length, model.text_hidden_size), torch.randn(1, model.pooled_size)
    )
    latents = torch.randn(1, model.in_channels, model.sample_size, model.sample_size)
    return Batch(latents, text, torch.zeros(1, dtype=torch.int64))


def load_modules(config: RunConfig) -> torch.nn.ModuleList:
    """Return the model with the imported weights as its base."""
    modules = build_chunks(config, initialise=False)
    start_from_base(modules, config)
    return modules


def forward(config: RunConfig, folder: Path) -> dict[str, float]:
    """Load the weights into the recurrent model and take one forward step at full resolution."""
    with process_groups(config):
        model, batch = load_modules(config)[0].eval(), make_batch(config)
        arguments = model_arguments(batch.latents, torch.tensor([500.0]), batch.draw_index, batch.conditions)
        started = time.perf_counter()
        with torch.no_grad():
            output = model(**arguments)
        assert output.isfinite().all()
        return {"forward_seconds": time.perf_counter() - started}


def fine_tune(config: RunConfig, folder: Path) -> dict[str, float]:
    """Take one training step with the frozen base; counts what has gradients and optimizer state."""
    small = replace(config, model=replace(config.model, sample_size=FINE_TUNING_SIZE))
    with process_groups(small):
        modules, batch = load_modules(small), make_batch(small)
        engine = build_engine(small, modules, DiffusionLoss(small, small.seed, batch.conditions))
        started = time.perf_counter()
        engine.step([batch])
        return {
            "step_seconds": time.perf_counter() - started,
            "trained_parameters": float(sum(p.numel() for p in modules.parameters() if p.requires_grad)),
        }


def encode(config: RunConfig, folder: Path) -> dict[str, float]:
    """Encode as many pictures of 1024 x 1024 as are encoded at once, with an autoencoder of Stable Diffusion 3's shape."""
    autoencoder = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), latent_channels=16, layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
    ).eval()  # fmt: skip
    images = torch.randint(0, 256, (PIXELS_AT_ONCE // 1024**2, 3, 1024, 1024), dtype=torch.uint8)
    started = time.perf_counter()
    latents = encode_images(autoencoder, images)
    assert latents.shape == (len(images), 16, 128, 128)
    return {"images": float(len(images)), "seconds_per_image": (time.perf_counter() - started) / len(images)}


def block(config: RunConfig, folder: Path) -> dict[str, float]:
    """Run one block forward and backward on one picture of 1024 x 1024 and its text, in fp32: not every CPU has fast products in bf16."""
    base = replace(
        config,
        precision=Precision.fp32,
        recurrence=None,
        fine_tuning=None,
        model=replace(config.model, num_layers=2, dual_attention_layers=[]),
    )
    with process_groups(base) as device:
        layer: Any = next(iter(build_chunks(base).modules())).get_submodule("0.transformer.layers.0")
        keys = torch.zeros(1, dtype=torch.int64)

        def run() -> None:
            vision, text, conditioning = _block_inputs(config)
            tokens = torch.cat((text, vision), dim=1).transpose(0, 1).detach().requires_grad_()
            del vision, text
            output, _ = layer(tokens, context=conditioning.unsqueeze(0), context_mask=keys)
            output.sum().backward()

        return {"tensors_gb": peak_tensor_bytes(run, device) / 1e9}


def diffusers_block(config: RunConfig, folder: Path) -> dict[str, float]:
    """Do the same with diffusers' block."""
    heads, hidden = config.model.num_attention_heads, config.model.hidden_size
    layer = JointTransformerBlock(hidden, heads, hidden // heads)

    def run() -> None:
        vision, text, conditioning = _block_inputs(config)
        outputs = layer(hidden_states=vision, encoder_hidden_states=text, temb=conditioning)
        sum(output.sum() for output in outputs).backward()

    return {"tensors_gb": peak_tensor_bytes(run, torch.device("cpu")) / 1e9}


def _block_inputs(config: RunConfig) -> list[torch.Tensor]:
    """Return vision and text tokens [1, S, H] and the conditioning vector [1, H], all of which want gradients."""
    hidden = config.model.hidden_size
    shapes = [(1, 64 * 64, hidden), (1, config.model.text_length, hidden), (1, hidden)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


STAGES: dict[str, Callable[[RunConfig, Path], dict[str, float]]] = {
    "encode": encode,
    "block": block,
    "diffusers_block": diffusers_block,
    "weights": make_weights,
    "import": import_weights,
    "forward": forward,
    "fine_tune": fine_tune,
    "export": export_weights,
}


# Of the stages that the ledger keeps: what the page calls them, in which order, and the code that their figures depend on.
TITLES = {
    "import": "import from sharded safetensors",
    "forward": "load, add recurrence (M=2, T=2, rank 128, blocks 4, 8, 12), one forward step at 1024 pixels (4096 + 333 tokens)",
    "fine_tune": "one training step of the added parameters at 256 pixels, base frozen",
    "export": "export to safetensors",
    "encode": "encode four pictures of 1024 x 1024",
    "block": "one block forward and backward",
    "diffusers_block": "diffusers' block forward and backward",
}
ROWS = {
    "import": "1-import", "forward": "2-forward", "fine_tune": "3-train", "export": "4-export",
    "encode": "encode", "block": "block", "diffusers_block": "diffusers-block",
}  # fmt: skip
_RUNNING = (
    "rmoe_megatron/conversion",
    "rmoe_megatron/engine",
    "rmoe_megatron/model",
    "rmoe_megatron/pretrained",
)
DEPENDS_ON = dict.fromkeys(("import", "forward", "fine_tune", "export"), _RUNNING) | {
    "encode": ("rmoe_megatron/encoders",),
    "block": ("rmoe_megatron/model",),
    "diffusers_block": (),
}


class AnonymousMemory:
    """Watches the process's memory that is not a mapped file."""

    def __init__(self) -> None:
        self.peak = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.05)


def anonymous_bytes() -> int:
    """Return this process's memory that is not a mapped file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def main() -> None:
    """Run the stages one after the other, or one of them in this process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="sd3_medium", choices=[name for name in PRESETS if "sd3" in name])
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    ledger.add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.stage:
        memory, started = AnonymousMemory(), time.perf_counter()
        found = STAGES[arguments.stage](make_config(arguments.preset, arguments.folder), arguments.folder)
        found["seconds"] = time.perf_counter() - started
        found["anonymous_gb"] = memory.peak / 1e9
        found["resident_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps(found))
        return
    print(f"{arguments.preset}, bf16, CPU, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for stage in arguments.stages:
        command = [
            sys.executable,
            __file__,
            str(arguments.folder),
            "--preset",
            arguments.preset,
            "--stage",
            stage,
        ]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        print(f"  {stage:10}", ", ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)
        if stage in DEPENDS_ON:
            paths = (*DEPENDS_ON[stage], "tools/benchmark_memory.py")
            ledger.write(arguments, found | {"stage": TITLES[stage]}, paths, torch.device("cpu"), ROWS[stage])


if __name__ == "__main__":
    main()
