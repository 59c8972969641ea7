"""results.json of every ``rmoe eval`` command holds what made it: sampler, weights, judge, libraries, and the score's standard error."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from PIL import Image

from rmoe_megatron.cli import main
from rmoe_megatron.cli.evaluation import eval_app
from rmoe_megatron.data.mazes.build import build_mazes
from rmoe_megatron.data.shapes.build import build_shapes
from rmoe_megatron.evaluation.imagenet import evaluate as imagenet
from rmoe_megatron.evaluation.preference import evaluate as preference
from tests.data.test_mazes import REGION
from tests.evaluation.test_corebench import save_tables
from tests.evaluation.test_dpg import TABLE
from tests.evaluation.test_imagenet import colours
from tests.evaluation.test_preference import save_pictures
from tests.evaluation.test_provenance import CAT, CIRCLES
from tests.hf.test_pipelines import recurrent_dit
from tests.support.judges import save_answerer, save_clip, save_detector
from tests.support.sd3_pipeline import save_pipeline

GENEVAL = [
    {"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"a photo of a {name}"}
    for name in ("cat", "bench")
]
DIGEST = re.compile(r"[0-9a-f]{16}")
COMMANDS = {
    "shapes": ["sd3", "--data", "{folder}/shapes", "--images-per-prompt", "1"],
    "mazes": ["sd3", "--data", "{folder}/mazes"],
    "geneval": [
        "sd3", "--metadata", "{folder}/geneval.jsonl", "--detector", "{folder}/detector", "--clip", "{folder}/clip",
        "--images-per-prompt", "1",
    ],
    "geneval2": ["sd3", "--data", "{folder}/geneval2.jsonl", "--answerer", "{folder}/answerer"],
    "dpg": ["sd3", "--data", "{folder}/dpg.csv", "--answerer", "{folder}/answerer", "--images-per-prompt", "1", "--protocol", "fixed"],
    "corebench": [
        "sd3", "--data", "{folder}/corebench", "--answerer", "{folder}/answerer", "--images-per-prompt", "1", "--limit", "24",
    ],
    "imagenet": ["dit", "--reference", "{folder}/reference.npz", "--inception", "{folder}/inception.pth", "--num-images", "8"],
}  # fmt: skip
# What weights of judges are told by; shapes and mazes are judged by this package's own code, which its fingerprint tells.
JUDGES = {
    "shapes": [], "mazes": [], "geneval": ["detector_sha256", "clip_sha256"], "geneval2": ["answerer_sha256"],
    "dpg": ["answerer_sha256"], "corebench": ["answerer_sha256"], "imagenet": ["reference_sha256", "extractor"],
}  # fmt: skip


def test_every_command_is_here() -> None:
    """But what scores a folder of pictures, tested below, and what compares results."""
    assert {each.name for each in eval_app.registered_commands} == {*COMMANDS, "preference", "compare"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    save_pipeline(folder / "sd3")
    recurrent_dit(folder / "dit")
    build_shapes(folder / "shapes", train=1, val=48, seed=1)
    build_mazes(folder / "mazes", REGION, {"train": 1, "val": 0, "test": 5}, seed=2)
    save_detector(folder / "detector")
    save_clip(folder / "clip")
    save_answerer(folder / "answerer", brief=True)
    save_tables(folder / "corebench", prompts=2)
    (folder / "geneval.jsonl").write_text("".join(json.dumps(each) + "\n" for each in GENEVAL))
    (folder / "geneval2.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (CAT, CIRCLES)))
    (folder / "dpg.csv").write_text(TABLE)
    (folder / "inception.pth").write_bytes(b"weights")
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "reference.npz", arr_0=images)
    return folder


def errors_of(value: Any) -> Iterator[Any]:
    """Yield all standard errors, wherever they stand."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        if key == "standard_error":
            yield each
        elif isinstance(each, dict | list):
            yield from errors_of(each)


def assert_versions(versions: dict[str, str]) -> None:
    assert re.search(r"code [0-9a-f]{16}$", versions["rmoe-megatron"])
    assert "numpy" in versions


def test_scores_of_a_folder_say_what_they_are_of(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Scorer:
        def to(self, device: torch.device) -> Self:
            return self

        def score(self, image: Image.Image, prompt: str) -> float:
            return float(len(prompt))

    monkeypatch.setattr(preference, "_load", lambda settings: Scorer())
    save_pictures(tmp_path / "made", ["a cat", "a dog", "two red circles"])
    command = ["eval", "preference", str(tmp_path / "made"), "--out", str(tmp_path / "out")]
    models = ["--weights", str(folder / "clip"), "--base", str(folder / "clip")]
    monkeypatch.setattr("sys.argv", ["rmoe", *command, *models])
    with pytest.raises(SystemExit, match="0"):
        main()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert DIGEST.fullmatch(results["sampling"]["images"])
    assert results["judge"]["scorer"] == "pickscore"
    for key in ("weights_sha256", "base_sha256"):
        assert DIGEST.fullmatch(results["judge"][key])
    assert_versions(results["judge"]["versions"])
    assert results["standard_error"] > 0


@pytest.mark.parametrize("name", COMMANDS)
def test_results_say_what_made_them(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagenet, "Inception", lambda weights, device: colours)
    model, *arguments = COMMANDS[name]
    given = [part.format(folder=folder) for part in arguments]
    sampled = ["--steps", "2", "--seed", "5", "--batch-size", "4", "--dtype", "fp32"]
    command = ["eval", name, str(folder / model), *given, *sampled, "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["rmoe", *command])
    with pytest.raises(SystemExit, match="0"):
        main()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    made, judge = results["sampling"], results["judge"]
    assert made["steps"] in (2, [2])
    assert (made["seed"], made["dtype"], made["batch_size"], made["device"]) == (5, "fp32", 4, "cpu")
    assert isinstance(made["guidance"], float)
    assert {"guidance_interval", "negative_prompt", "compile", "size", "depth"} <= made.keys()
    assert made["sampler"]["class"].endswith("Scheduler")
    assert len(made["sampler"]) > 3  # with all its settings
    assert made["weights"]["pipeline"].endswith("Pipeline")
    for component in ("transformer", "vae", "scheduler"):
        assert DIGEST.fullmatch(made["weights"][component])
    assert_versions(made["versions"])
    assert_versions(judge["versions"])
    assert {"torch", "diffusers", "transformers"} <= made["versions"].keys()
    for key in JUDGES[name]:
        assert DIGEST.fullmatch(judge[key])
    assert results["model"] == str(folder / model)
    assert any(key in results for key in ("prompt_set", "class_labels"))
    errors = list(errors_of(results))
    if name == "imagenet":  # distances of distributions have no prompts
        assert not errors
    else:
        assert errors
        assert all(isinstance(error, float) for error in errors)
