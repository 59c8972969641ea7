"""The base install alone loads, samples and scores exports; what it cannot do names the extra that can."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from webdataset import tariterators

from rmoe_megatron.cli.missing_extra import extra_of
from rmoe_megatron.conversion.export import build_pipeline
from rmoe_megatron.data.shapes.build import build_shapes
from rmoe_megatron.data.shards.archive import base_plus_ext
from rmoe_megatron.pretrained.architecture import transformer_arguments, transformer_class
from tests.support.configurations import MODEL, randomise, tiny_config

# A process that finds nothing but the standard library, this package and what its base install requires, all the way
# down. It runs the command lines of its arguments (JSON) and prints the exit code of each.
BASE_INSTALL = """
import importlib.metadata as metadata, json, sys
from importlib.machinery import PathFinder
from packaging.requirements import Requirement

def normalised(name):
    return name.replace("_", "-").replace(".", "-").lower()

installed, waiting = set(), ["rmoe-megatron"]
while waiting:
    name = waiting.pop()
    if name not in installed:
        installed.add(name)
        requirements = [Requirement(text) for text in metadata.requires(name) or []]
        waiting += [
            normalised(requirement.name)
            for requirement in requirements
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ]
hidden = {
    module
    for module, names in metadata.packages_distributions().items()
    if not any(normalised(name) in installed for name in names)
}
assert {"megatron", "wandb", "tensorboard", "omegaconf", "matplotlib", "webdataset", "pytest"} <= hidden, hidden

class BaseInstall(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = BaseInstall
from rmoe_megatron.cli import main

codes = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["rmoe", *arguments]
    try:
        main()
    except SystemExit as end:
        codes.append(end.code or 0)
print("codes", codes)
"""


def test_the_base_install_samples_and_scores_and_names_the_extra_that_trains(tmp_path: Path) -> None:
    config = tiny_config(
        model=replace(MODEL, sample_size=32, patch_size=8, text_hidden_size=384, pooled_size=384)
    )
    transformer = transformer_class(config)(**transformer_arguments(config)).eval()
    randomise(transformer, std=0.1)
    build_pipeline(config, transformer).save_pretrained(tmp_path / "model")
    build_shapes(tmp_path / "shapes", train=1, val=6, seed=0)
    (tmp_path / "run").mkdir()  # what is missing would be said first
    commands = [
        ["sample", f"{tmp_path}/model", "--prompt", "two red circles", "--steps", "2", "--out", f"{tmp_path}/images"],
        ["eval", "shapes", f"{tmp_path}/model", "--data", f"{tmp_path}/shapes", "--out", f"{tmp_path}/scores",
         "--steps", "1", "--images-per-prompt", "1", "--limit", "6"],
        ["train", "configs/shapes_tiny.yaml"],
        ["convert", "to-hf", f"{tmp_path}/run", f"{tmp_path}/other"],
    ]  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-c", BASE_INSTALL, json.dumps(commands)],
        capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert process.stdout.splitlines()[-1] == "codes [0, 0, 2, 2]", process.stdout + process.stderr
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        f"error: `rmoe {command}` needs the train extra (omegaconf is not installed); "
        "run `pip install 'rmoe-megatron[train]'`."
        for command in ("train", "convert to-hf")
    ]
    assert "Traceback" not in process.stderr
    assert np.asarray(Image.open(tmp_path / "images" / "00000.png")).shape == (32, 32, 3)
    assert json.loads((tmp_path / "scores" / "results.json").read_text())["splits"]["seen"]["images"] == 6


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("megatron", ("train", "megatron-core")),
        ("emerging_optimizers", ("train", "emerging-optimizers")),
        ("wandb.sdk", ("train", "wandb")),
        ("deepspeed", ("deepspeed", "deepspeed")),
        ("transformer_engine.pytorch", ("gpu", "transformer-engine")),
        ("pytest", ("dev", "pytest")),
        ("pyarrow", ("data", "pyarrow")),
        ("torch_fidelity", ("eval", "torch-fidelity")),
        ("torch", None),
        ("rmoe_megatron.modle", None),
        ("", None),
    ],
)
def test_a_missing_module_is_traced_to_its_extra(module: str, expected: tuple[str, str] | None) -> None:
    assert extra_of(module) == expected


@given(st.text("ab./_\n-", max_size=12))
def test_member_names_are_split_as_webdataset_splits_them(path: str) -> None:
    key, extension = tariterators.base_plus_ext(path)
    assert base_plus_ext(path) == (key, extension or "")
