"""One file in the original layout: read by diffusers' own conversion and by the original's equations, and imported again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file

from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.config.run import ParallelConfig
from rmoe_megatron.conversion.facebook_dit import FacebookDiT
from rmoe_megatron.conversion.single_file import export_single_file
from rmoe_megatron.errors import UserError
from tests.conversion.test_original_dit import inputs, make_original
from tests.conversion.test_sd3_file import MODELS, PREFIX, TEXT_LENGTH, diffusers_own, write
from tests.support.commands import rmoe
from tests.support.diffusers_models import save_model
from tests.support.original_sd3 import original_sd3


def import_file(file: Path, run: Path, **settings: Any) -> RunWeights:
    from rmoe_megatron.conversion.importing import import_diffusers

    import_diffusers(file, run, TEXT_LENGTH, ParallelConfig(), **settings)
    return RunWeights(run)


@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_comes_back_as_it_was_published(name: str, tmp_path: Path) -> None:
    """Names, shapes and bits; dual attention and norms of queries and keys among them."""
    published = original_sd3(**MODELS[name][0])
    imported = import_file(write(tmp_path / "sd3.safetensors", published), tmp_path / "run")
    export_single_file(tmp_path / "run", tmp_path / "models" / "again.safetensors")
    again = load_file(tmp_path / "models" / "again.safetensors")
    assert again.keys() == {f"{PREFIX}{key}" for key in published}
    assert all(torch.equal(again[f"{PREFIX}{key}"], value) for key, value in published.items())
    weights = import_file(tmp_path / "models" / "again.safetensors", tmp_path / "imported")
    assert weights.config.model == imported.config.model
    assert weights.fingerprint() == imported.fingerprint()


@pytest.mark.parametrize("name", ["sd3.5-medium", "sd3.5-large"])
def test_diffusers_reads_the_file_to_the_same_weights(name: str, tmp_path: Path) -> None:
    """Its conversion by itself, and its loading of single files."""
    theirs = save_model(name, tmp_path / "model")
    import_file(tmp_path / "model", tmp_path / "run")
    export_single_file(tmp_path / "run", tmp_path / "file.safetensors")
    converted = convert_sd3_transformer_checkpoint_to_diffusers(load_file(tmp_path / "file.safetensors"))
    loaded = SD3Transformer2DModel.from_single_file(
        str(tmp_path / "file.safetensors"), config=str(tmp_path / "model"), local_files_only=True
    )
    for found in (converted, loaded.state_dict()):
        assert found.keys() == theirs.state_dict().keys()
        assert all(torch.equal(found[key], value) for key, value in theirs.state_dict().items())


def test_a_model_without_norms_has_heads_of_64(tmp_path: Path) -> None:
    """SD3-medium's, whose file does not say the width of a head."""
    file = write(tmp_path / "sd3.safetensors", original_sd3(**MODELS["sd3-medium"][0]))
    import_file(file, tmp_path / "run")
    export_single_file(tmp_path / "run", tmp_path / "half.safetensors", dtype=torch.bfloat16)
    expected = diffusers_own(file, "sd3-medium", tmp_path).to(torch.bfloat16).state_dict()
    found = diffusers_own(tmp_path / "half.safetensors", "sd3-medium", tmp_path).state_dict()
    assert all(torch.equal(found[key], value.float()) for key, value in expected.items())
    save_model("sd3-medium", tmp_path / "narrow")
    import_file(tmp_path / "narrow", tmp_path / "narrow_run")
    with pytest.raises(UserError, match=r"no place for heads of width 16 without model.qk_norm \(only 64\)"):
        export_single_file(tmp_path / "narrow_run", tmp_path / "narrow.safetensors")
    assert not (tmp_path / "narrow.safetensors").exists()


def test_a_dit_is_the_original_s_state_dict(tmp_path: Path) -> None:
    """Strictly loaded by the original's equations, positions and all; imported again it is the run that it was."""
    from rmoe_megatron.conversion.importing import import_facebook_dit

    original = make_original()
    torch.save(original.state_dict(), tmp_path / "dit.pt")
    import_facebook_dit(tmp_path / "dit.pt", tmp_path / "run", 2, ParallelConfig())
    export_single_file(tmp_path / "run", tmp_path / "dit.safetensors")
    state = load_file(tmp_path / "dit.safetensors")
    assert state.keys() == original.state_dict().keys()
    torch.testing.assert_close(state["pos_embed"], original.pos_embed.data, rtol=0, atol=1e-6)
    for name, value in original.state_dict().items():
        assert name == "pos_embed" or torch.equal(state[name], value), name
    other = make_original()
    other.load_state_dict({name: torch.zeros_like(value) for name, value in state.items()})
    other.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(other(*inputs(500)), original(*inputs(500)))
    import_facebook_dit(tmp_path / "dit.safetensors", tmp_path / "again", 2, ParallelConfig())
    assert RunWeights(tmp_path / "again").config.model == RunWeights(tmp_path / "run").config.model
    assert RunWeights(tmp_path / "again").fingerprint() == RunWeights(tmp_path / "run").fingerprint()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dit", ["model.downscale_freq_shift=1 (only 0)", "model.mlp_norm_eps=1e-05 (only 1e-06)"]),
        ("dit-own-embeddings", ["timestep and label embeddings of every block's own"]),
    ],
)
def test_a_dit_of_diffusers_is_another_function(name: str, words: list[str], tmp_path: Path) -> None:
    save_model(name, tmp_path / "model")
    import_file(tmp_path / "model", tmp_path / "run")
    with pytest.raises(UserError) as error:
        export_single_file(tmp_path / "run", tmp_path / "dit.safetensors")
    assert all(word in str(error.value) for word in words)


def test_three_projections_of_another_width_are_named(tmp_path: Path) -> None:
    """As many rows as one projection, whose shape alone would pass for the query's."""
    state = make_original().state_dict()
    state["blocks.1.attn.qkv.bias"] = torch.ones(32)
    torch.save(state, tmp_path / "dit.pt")
    with pytest.raises(UserError, match=r"blocks.1.attn.qkv.bias has shape \(32,\) instead of 96 rows"):
        FacebookDiT(tmp_path / "dit.pt", 2)


def test_the_command_writes_a_file_once_and_says_whose_it_is(tmp_path: Path) -> None:
    import_file(
        write(tmp_path / "sd3.safetensors", original_sd3(**MODELS["sd3.5-large"][0])), tmp_path / "run"
    )
    file = tmp_path / "out.safetensors"
    code, output = rmoe("convert", "to-single-file", str(tmp_path / "run"), str(file), "--dtype", "bf16")
    assert code == 0, output
    assert "take the number of blocks from the width (width / 64)" in output
    with safe_open(file, "pt") as opened:
        record = opened.metadata()
        assert opened.get_tensor(f"{PREFIX}pos_embed").dtype == torch.bfloat16
    assert (record["format"], record["run"], record["step"]) == ("pt", "run", "0")
    assert json.loads(record["recipe"])["model"]["num_layers"] == 3
    for target, words in (
        (file, "exists; choose another name"),
        (tmp_path / "a.pt", "must be a .safetensors file"),
    ):
        code, output = rmoe("convert", "to-single-file", str(tmp_path / "run"), str(target))
        assert (code, words in output) == (2, True), output
    assert [path.name for path in tmp_path.glob("*.partial")] == []
