"""The page of a user's day with Stable Diffusion 3.5: its commands, as they stand there, on tiny weights in the published form."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support.commands import rmoe
from tests.support.runs import losses
from tests.support.sd3_pipeline import make_pipeline

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "configs" / "sd35_medium.md"
HUB = "stabilityai/stable-diffusion-3.5-medium"
# What a tiny run changes: its length, its place, and what three blocks of width 32 have room for.
TINY = [
    "device=cpu", "precision=fp32", "training.steps=2", "training.sample_every=2", "training.sample_steps=1", "checkpoint.every=2",
    "optimizer.warmup_steps=0",
]  # fmt: skip
OF_CONFIGURATION = {
    "configs/sd35_medium_lora.yaml": ["lora.layers=[0,1,2]", "lora.rank=2"],
    "configs/sd35_medium_recurrent.yaml": ["recurrence.layers=[0,2]", "recurrence.rank=2"],
    "configs/sd35_medium_full.yaml": [],
}
HUB_COMMANDS = ["hf auth login", f"hf download {HUB}"]  # which need a network


def blocks(language: str) -> list[str]:
    """Return what stands in the page's blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines()]


def adapted(command: str) -> list[str]:
    """Return the arguments of rmoe; those that take a configuration get the settings of a tiny run behind theirs."""
    words = shlex.split(command)[1:]
    named = [word for word in words if word in OF_CONFIGURATION]
    return words + (TINY + OF_CONFIGURATION[named[0]] if named else [])


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder after the whole page: a folder of the repository's name stands for the hub, as everywhere."""
    folder = tmp_path_factory.mktemp("day")
    make_pipeline(qk_norm="rms_norm", dual_attention_layers=(0, 1)).save_pretrained(folder / HUB)
    (folder / HUB / "README.md").write_text("---\nlicense: other\nlicense_name: a-licence\n---\n# A model\n")
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "my_pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "my_pictures" / f"{number}.jpg")
        (folder / "my_pictures" / f"{number}.txt").write_text("a photo of my dog on a sofa")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands():
            if not command.startswith("hf "):
                code, output = rmoe(*adapted(command))
                assert code == 0, f"{command}: {output}"
    return folder


def test_only_the_commands_of_the_hub_are_not_run(day: Path) -> None:
    left = [command for command in commands() if not command.startswith("rmoe ")]
    assert [command.partition(" --")[0] for command in left] == HUB_COMMANDS
    assert (day / "runs" / "sd35_medium").is_dir()


def test_every_configuration_trains_what_it_says(day: Path) -> None:
    page = PAGE.read_text()
    for name in OF_CONFIGURATION:
        assert f"({Path(name).name})" in page
        run = day / "runs" / Path(name).stem
        assert 2 in losses(run)
        assert (run / "samples" / "step-00000002.png").is_file()
    assert {path.name for path in (ROOT / "configs").glob("sd35_medium_*.yaml")} == {
        Path(name).name for name in OF_CONFIGURATION
    }


def test_the_exports_hold_the_same_model(day: Path) -> None:
    """The single file read by diffusers is the merged folder; it is the base but for what LoRA adapts."""
    models = day / "models"
    weights = "transformer/diffusion_pytorch_model.safetensors"
    merged, base = load_file(models / "my_dog" / weights), load_file(day / HUB / weights)
    single = SD3Transformer2DModel.from_single_file(
        str(models / "my_dog.safetensors"),
        config=str(models / "my_dog" / "transformer"),
        local_files_only=True,
    ).state_dict()
    assert single.keys() == merged.keys() == base.keys()
    assert all((single[key] == value.float()).all() for key, value in merged.items())
    changed = {key for key, value in base.items() if (value.bfloat16() != merged[key]).any()}
    adapted = {f"transformer_blocks.{block}.attn.to_{part}.weight" for block in range(3) for part in "qkv"}
    assert changed
    assert changed <= adapted
    factors = load_file(models / "my_dog_lora" / "pytorch_lora_weights.safetensors")
    assert {key.split(".lora_")[0] for key in factors} == {
        f"transformer.{key.removesuffix('.weight')}" for key in adapted
    }
    assert (models / "my_dog_recurrent" / "transformer" / "recurrent_sd3.py").is_file()


def test_the_pages_of_the_exports_say_what_they_are(day: Path) -> None:
    for name, rows in (
        (
            "my_dog",
            [
                "| LoRA | rank 2, blocks 0, 1, 2 |",
                "*Step 2: a photo of my dog on a beach; a photo of a dog on a beach. Not picked.*",
            ],
        ),
        ("my_dog_recurrent", ["| recurrence | 2 modules, 2 steps, blocks 0, 2 |", "trust_remote_code=True"]),
        ("my_dog_lora", ["| LoRA | rank 2, blocks 0, 1, 2 |", 'pipeline.load_lora_weights(".")']),
    ):
        page = (day / "models" / name / "README.md").read_text()
        for words in (
            *rows, "| base | `stable-diffusion-3.5-medium` |", "| licence | other, a-licence |", "license_name: ", "| data | `data/mine_sd35` |",
            "2 steps of 4 samples", "learning rate 0.000", "| trained | what was added |", "(samples.png)",
        ):  # fmt: skip
            assert words in page, page
        assert (day / "models" / name / "samples.png").is_file()
    assert "to-single-file" in (day / "models" / "my_dog" / "README.md").read_text()
    assert "to-single-file" not in (day / "models" / "my_dog_recurrent" / "README.md").read_text()


def test_the_python_of_the_page_draws(day: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(day)
    (snippet,) = blocks("python")
    exec(compile(snippet, str(PAGE), "exec"), {})
    assert Image.open(day / "snow.png").size == (16, 16)
    assert Image.open(day / "samples" / "00000.png").size == (16, 16)
    assert isinstance(
        StableDiffusion3Pipeline.from_pretrained(day / "models" / "my_dog"), StableDiffusion3Pipeline
    )


def test_diffusers_loads_the_lora_beside_the_base(day: Path, tmp_path: Path) -> None:
    """``load_lora_weights`` on the base's pipeline adds B A to each projection; two steps move B little, so here it is larger."""
    pytest.importorskip("peft", reason="there is no peft: pip install peft")
    name = "pytorch_lora_weights.safetensors"
    factors = {
        key: value.float() * (100 if ".lora_B." in key else 1)
        for key, value in load_file(day / "models" / "my_dog_lora" / name).items()
    }
    save_file(factors, tmp_path / name)
    pipeline = StableDiffusion3Pipeline.from_pretrained(day / HUB, torch_dtype=torch.float32)
    merged = SD3Transformer2DModel.from_pretrained(day / HUB / "transformer", torch_dtype=torch.float32)
    weights = merged.state_dict()
    for key in factors:
        if key.endswith(".lora_B.weight"):
            adapted = key.removeprefix("transformer.").removesuffix(".lora_B.weight")
            weights[f"{adapted}.weight"] += factors[key] @ factors[key.replace(".lora_B.", ".lora_A.")]
    config, generator = merged.config, torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(
            1, config.in_channels, config.sample_size, config.sample_size, generator=generator
        ),
        "encoder_hidden_states": torch.randn(1, 7, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=generator),
        "timestep": torch.tensor([500.0]),
        "return_dict": False,
    }
    with torch.no_grad():
        base = pipeline.transformer(**inputs)[0]
        pipeline.load_lora_weights(str(tmp_path))
        found, expected = pipeline.transformer(**inputs)[0], merged(**inputs)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (base - expected).abs().max() > 1e-3
