"""DiTs as they were published before diffusers had a class for them: ``Transformer2DModel`` with ``ada_norm_zero``."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, Transformer2DModel

from rmoe_megatron.errors import UserError
from rmoe_megatron.inference.sampling import load_pipeline, sample_images
from rmoe_megatron.pretrained.architecture import read_architecture
from tests.hf.test_pipelines import recurrent_dit
from tests.support.diffusers_models import inputs, save_model

# The keys of facebook/DiT-XL-2-256's transformer/config.json, with small sizes.
FORMER: dict[str, Any] = {
    "_class_name": "Transformer2DModel", "_diffusers_version": "0.12.0.dev0", "activation_fn": "gelu-approximate",
    "attention_bias": True, "attention_head_dim": 16, "cross_attention_dim": None, "double_self_attention": False, "dropout": 0.0,
    "in_channels": 4, "norm_elementwise_affine": False, "norm_num_groups": 32, "norm_type": "ada_norm_zero", "num_attention_heads": 2,
    "num_embeds_ada_norm": 7, "num_layers": 3, "num_vector_embeds": None, "only_cross_attention": False, "out_channels": 8,
    "patch_size": 2, "sample_size": 8, "upcast_attention": False, "use_linear_projection": False,
}  # fmt: skip


def describe(folder: Path, **values: Any) -> None:
    described = {key: value for key, value in (FORMER | values).items() if value != "left out"}
    (folder / "config.json").write_text(json.dumps(described))


def test_it_is_what_diffusers_takes_it_for(tmp_path: Path) -> None:
    save_model("dit", tmp_path)
    today = read_architecture(tmp_path, 0)
    describe(tmp_path)
    assert read_architecture(tmp_path, 0) == today
    assert type(Transformer2DModel.from_pretrained(tmp_path)) is DiTTransformer2DModel


def test_a_pipeline_of_it_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recurrent_dit(tmp_path)
    for path in (tmp_path / "transformer").iterdir():
        path.unlink()
    model = save_model("dit", tmp_path / "transformer")
    describe(tmp_path / "transformer")
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {"transformer": ["diffusers", "Transformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = load_pipeline(tmp_path).transformer
    assert type(loaded) is DiTTransformer2DModel
    with torch.no_grad():
        assert torch.equal(loaded(**inputs("dit")).sample, model(**inputs("dit")).sample)
    assert not caplog.records
    # diffusers' own pipeline would look for the dropped label at 1000, which this model of seven classes has not.
    index |= {"_class_name": "DiTPipeline", "id2label": {"0": "tench"}}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    images = sample_images(load_pipeline(tmp_path), ["1"], [0], steps=2, guidance=2.0, batch_size=1)
    assert images.shape[0] == 1
    index |= {"transformer": ["diffusers", "PixArtTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="has transformer .*PixArtTransformer2DModel"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"norm_type": "ada_norm_single"}, 'norm_type "ada_norm_single", which is no DiT'),
        ({"norm_type": "layer_norm", "patch_size": None}, 'norm_type "layer_norm", which is no DiT'),
        ({"norm_type": "left out"}, 'norm_type "layer_norm", which is no DiT'),
        ({"norm_type": ["ada_norm_zero"]}, "which is no DiT"),
        ({"activation_fn": "left out"}, "activation_fn geglu"),
        ({"attention_bias": "left out"}, "attention_bias False"),
        ({"cross_attention_dim": 768}, "cross_attention_dim 768"),
        ({"caption_channels": 4096}, "caption_channels 4096"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm null"),
        ({"num_layers": 10**9}, "num_layers 1000000000"),
    ],
)
def test_other_models_of_that_class_are_refused(
    values: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    describe(tmp_path, **values)
    with pytest.raises(UserError, match=complaint):
        read_architecture(tmp_path, 0)
