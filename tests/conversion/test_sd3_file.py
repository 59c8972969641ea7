"""Stable Diffusion 3 and 3.5 in one file: imported as diffusers' own ``from_single_file`` takes them."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.config.run import ParallelConfig
from rmoe_megatron.conversion.export import export_run
from rmoe_megatron.conversion.sd3_file import SD3File
from rmoe_megatron.errors import UserError
from tests.pretrained.test_foreign_folders import outcome
from tests.support.commands import rmoe
from tests.support.original_sd3 import CHANNELS, PATCH, POOLED, SIDE, TEXT, original_sd3

PREFIX = "model.diffusion_model."
# As SD3-medium, SD3.5-medium and SD3.5-large: name -> (arguments of the file, what diffusers' configuration says of it).
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sd3-medium": ({"depth": 2, "hidden": 128}, {"num_attention_heads": 2, "attention_head_dim": 64}),
    "sd3.5-medium": (
        {"depth": 3, "hidden": 32, "head": 16, "second": (0, 1)},
        {"num_attention_heads": 2, "attention_head_dim": 16, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    ),
    "sd3.5-large": (
        {"depth": 3, "hidden": 32, "head": 16},
        {"num_attention_heads": 2, "attention_head_dim": 16, "qk_norm": "rms_norm"},
    ),
}  # fmt: skip
TEXT_LENGTH = 5
OTHERS = {
    "first_stage_model.decoder.conv_in.weight": torch.ones(1),
    "text_encoders.clip_l.logit_scale": torch.ones(()),
}


def write(path: Path, state: dict[str, Tensor], prefix: str = PREFIX, **others: Tensor) -> Path:
    save_file({f"{prefix}{name}": value.contiguous() for name, value in state.items()} | others, path)
    return path


def diffusers_own(file: Path, name: str, folder: Path) -> SD3Transformer2DModel:
    """The file as diffusers loads it, told its configuration."""
    arguments, said = MODELS[name]
    config = {
        "sample_size": SIDE * PATCH, "patch_size": PATCH, "in_channels": CHANNELS, "out_channels": CHANNELS,
        "num_layers": arguments["depth"], "joint_attention_dim": TEXT, "caption_projection_dim": arguments["hidden"],
        "pooled_projection_dim": POOLED, "pos_embed_max_size": SIDE, **said,
    }  # fmt: skip
    SD3Transformer2DModel(**config).save_config(folder / "config")
    model = SD3Transformer2DModel.from_single_file(
        str(file), config=str(folder / "config"), local_files_only=True
    )
    assert isinstance(model, SD3Transformer2DModel)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_weights_are_those_of_diffusers(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from rmoe_megatron.conversion.importing import import_diffusers

    file = write(tmp_path / "sd3.safetensors", original_sd3(**MODELS[name][0]), **OTHERS)
    with caplog.at_level(logging.WARNING):
        import_diffusers(file, tmp_path / "run", TEXT_LENGTH, ParallelConfig())
    assert "first_stage_model, text_encoders there are left" in caplog.text
    config = RunWeights(tmp_path / "run").config
    assert config.diffusion.shift == 3.0
    assert config.model.dual_attention_layers == list(MODELS[name][1].get("dual_attention_layers", ()))
    export_run(tmp_path / "run", tmp_path / "out")
    exported = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    expected = diffusers_own(file, name, tmp_path)
    assert exported.keys() == expected.state_dict().keys()
    assert all(torch.equal(value, exported[key]) for key, value in expected.state_dict().items())
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "out" / "transformer").eval()
    inputs = {
        "hidden_states": torch.randn(2, CHANNELS, 8, 8),
        "timestep": torch.tensor([15.0, 870.0]),
        "encoder_hidden_states": torch.randn(2, TEXT_LENGTH, TEXT),
        "pooled_projections": torch.randn(2, POOLED),
    }
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).sample, expected(**inputs).sample)


def test_the_command_takes_a_file(tmp_path: Path) -> None:
    """Through a link, as people keep large files."""
    write(tmp_path / "large.safetensors", original_sd3(**MODELS["sd3.5-large"][0]), prefix="")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sd3.safetensors").symlink_to("../large.safetensors")
    code, errors = rmoe(
        "convert",
        "from-hf",
        str(tmp_path / "models" / "sd3.safetensors"),
        str(tmp_path / "run"),
        "--text-length",
        "5",
    )
    assert code == 0, errors
    assert RunWeights(tmp_path / "run").config.model.num_layers == 3


def changed(state: dict[str, Tensor], **values: Tensor | None) -> dict[str, Tensor]:
    merged: dict[str, Tensor | None] = {**state, **values}
    return {name: value for name, value in merged.items() if value is not None}


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"pos_embed": None}, "pos_embed is missing or has not 3 axes"),
        ({"x_embedder.proj.weight": torch.ones(4)}, "x_embedder.proj.weight is missing or has not 4 axes"),
        ({"joint_blocks.1.x_block.attn.qkv.weight": None}, "missing joint_blocks.1.x_block.attn.qkv.weight"),
        ({"joint_blocks.1.x_block.more": torch.ones(1)}, "unexpected joint_blocks.1.x_block.more"),
        ({"joint_blocks.7.x_block.more": torch.ones(1)}, "lacks blocks between"),
        ({"joint_blocks.999.x_block.more": torch.ones(1)}, "lacks blocks between"),
        ({"joint_blocks.0.x_block.attn.qkv.bias": torch.ones(95)}, "instead of"),
        ({"final_layer.linear.bias": torch.ones(17)}, "out_channels|instead of|does not hold"),
        ({"t_embedder.mlp.0.bias": torch.ones(32, dtype=torch.int8)}, "of type I8; weights are"),
        ({"t_embedder.mlp.0.bias": torch.ones(())}, r"of shape \(\), as no weight is"),
        ({"t_embedder.mlp.0.bias": torch.ones(0)}, r"of shape \(0,\), as no weight is"),
    ],
)
def test_another_file_is_refused(values: dict[str, Tensor | None], complaint: str, tmp_path: Path) -> None:
    from rmoe_megatron.conversion.importing import import_diffusers

    state = changed(original_sd3(**MODELS["sd3.5-large"][0]), **values)
    file = write(tmp_path / "sd3.safetensors", state)
    with pytest.raises(UserError, match=complaint) as raised:
        import_diffusers(file, tmp_path / "run", TEXT_LENGTH, ParallelConfig())
    assert str(file) in str(raised.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_files_of_other_kinds_are_told(tmp_path: Path) -> None:
    from rmoe_megatron.conversion.importing import import_diffusers

    def refused(file: Path, complaint: str) -> None:
        with pytest.raises(UserError, match=complaint):
            import_diffusers(file, tmp_path / "run", TEXT_LENGTH, ParallelConfig())

    save_file({"transformer_blocks.0.x": torch.ones(1)}, tmp_path / "diffusers.safetensors")
    refused(tmp_path / "diffusers.safetensors", "is in diffusers' layout; name its folder")
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "there are no joint_blocks")
    (tmp_path / "sd3.ckpt").write_bytes(b"")
    refused(tmp_path / "sd3.ckpt", "neither a folder nor a .safetensors file")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    refused(tmp_path / "junk.safetensors", "cannot be read")
    refused(tmp_path / "missing.safetensors", "There is no folder")


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_file_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    state = original_sd3(**MODELS["sd3.5-medium"][0])
    names = sorted(state)
    name = data.draw(st.sampled_from(names))
    kind = data.draw(st.sampled_from(["delete", "rename", "shape", "add"]))
    if kind == "shape":
        state[name] = torch.ones(data.draw(st.lists(st.integers(0, 40), max_size=4)))
    elif kind == "add":
        number = data.draw(st.sampled_from(["1", "2", "9", "x", "-1", "٣", "0001", ""]))
        state[
            f"joint_blocks.{number}.{data.draw(st.sampled_from(['x_block.attn.qkv.weight', 'attn2.', '']))}"
        ] = torch.ones(3)
    else:
        value = state.pop(name)
        if kind == "rename":
            state[data.draw(st.text(max_size=12) | st.sampled_from(names))] = value
    file = write(tmp_path / "sd3.safetensors", state)

    def read() -> None:
        source = SD3File(file, TEXT_LENGTH)
        for each, shape in source.shapes.items():
            assert tuple(source.read(each).shape) == shape

    outcome(read)
