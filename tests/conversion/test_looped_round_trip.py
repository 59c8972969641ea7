"""A looped model with rotary positions and exclusive attention: read from diffusers' folder, run, and written again."""

from dataclasses import asdict
from pathlib import Path

import torch

from rmoe_megatron.config.model import LoopConfig
from rmoe_megatron.conversion.export import export_run
from rmoe_megatron.hf import RecurrentSD3Transformer2DModel
from rmoe_megatron.inference.sampling import load_pipeline
from tests.conversion.test_import_export import RECURRENCE_SETTINGS, assert_close, import_model, load_ours
from tests.support.configurations import one_rank, randomise
from tests.support.diffusers_models import SD3, in_memory, inputs, run_ours

LOOP = LoopConfig(first=0, last=1, times=3)
SETTINGS = SD3 | {
    "qk_norm": "rms_norm", "loop": asdict(LOOP), "rope_theta": 100.0, "exclusive_attention": True,
    "recurrence": RECURRENCE_SETTINGS | {"gate_inputs": ["unmodulated_tokens", "conditioning"]},
}  # fmt: skip


def test_import_and_export_give_back_model_and_settings(tmp_path: Path) -> None:
    theirs = RecurrentSD3Transformer2DModel(**SETTINGS)
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path / "model")
    weights = import_model(tmp_path / "model", tmp_path / "run")
    config, arguments = weights.config, inputs("sd3-medium")
    assert config.loop == LOOP
    assert (config.model.rope_theta, config.model.exclusive_attention) == (100.0, True)
    assert config.recurrence is not None
    assert config.recurrence.gate_inputs == ["unmodulated_tokens", "conditioning"]
    with one_rank(config), torch.no_grad():
        expected = theirs(**arguments).sample
        assert_close(run_ours(load_ours(weights).eval(), arguments), expected, "output of the import")
    export_run(tmp_path / "run", tmp_path / "exported", averaged=False)
    exported = in_memory(load_pipeline(tmp_path / "exported").transformer)
    assert {name: exported.config[name] for name in SETTINGS} == {
        name: theirs.config[name] for name in SETTINGS
    }
    for name, value in exported.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    with torch.no_grad():
        exported.set_depth(5)
        theirs.set_depth(5)
        assert torch.equal(exported(**arguments).sample, theirs(**arguments).sample)
