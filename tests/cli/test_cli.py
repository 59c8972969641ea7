"""The command line: exit code 2 and one sentence for mistakes, before anything heavy."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.commands import rmoe
from tests.support.runs import assert_same_picture, losses, make_run, write_shard

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "{config}", "model.hiden_size=3"], "did you mean model.hidden_size?"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train"], "configuration file"),
        (["train", "{config}", "parallel.tensor_model_parallel_size=2"], "is not divisible by"),
        (["train", "{config}", "data.train={folder}/empty"], "no .tar shards"),
        (["train", "{config}", "data.train={folder}/images"], "smaller than the model"),
        (["train", "{config}", "data.captions=[text]"], "data.captions has the entry"),
        (["train", "{config}", "model.text_length=7"], "text_hidden_states from"),
        (["train", "{config}", "run_dir={folder}/config.yaml/run"], "is a file"),
        (["train", "--resume", "{folder}/nothing"], "no run"),
        (["train", "--resume", "{folder}/empty"], "no complete checkpoint"),
        (["convert", "to-hf", "{folder}/nothing", "{folder}/out"], "no run"),
        (["sample", "{folder}/empty", "--prompt", "x"], "model_index.json"),
        (["sample", "{folder}/empty"], "no prompt"),
        (
            ["eval", "shapes", "{folder}/empty", "--data", "{folder}/data", "--out", "{folder}/o"],
            "model_index.json",
        ),
        (
            ["eval", "shapes", "{folder}/model", "--data", "{folder}/empty", "--out", "{folder}/o"],
            "no shard folder",
        ),
        (["convert", "from-hf", "{folder}/nowhere", "{folder}/r"], "no folder"),
        (["convert", "from-hf", "{folder}/data", "{folder}/r"], "config.json"),
        (["convert", "from-hf", "{folder}/data", "{folder}/r", "seed=1"], "parallel section"),
        (["convert", "from-facebook-dit", "{config}", "{folder}/r"], "plain tensors"),
        (["convert", "to-hf", "{folder}/nowhere", "{folder}/m"], "no run"),
        (["convert", "to-hf", "{folder}", "{folder}/m", "--dtype", "fp8"], "--dtype fp8"),
        (["data", "build-shapes", "{folder}"], "not an empty folder"),
        (["data", "precompute", "{config}", "{folder}/empty", "{folder}/out"], "no .tar shards"),
    ],
)
def test_mistakes_get_one_sentence_and_exit_code_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    config = make_run(tmp_path)
    (tmp_path / "empty").mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (7, 32)).save(picture, format="png")
    write_shard(tmp_path / "images" / "a.tar", [{"png": picture.getvalue(), "txt": b"a circle"}])
    code, errors = rmoe(*[argument.format(config=config, folder=tmp_path) for argument in arguments])
    assert code == 2, errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    assert words in lines[0]
    assert "Traceback" not in errors


def test_check_prints_the_resolved_configuration_and_trains_nothing(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    code, errors = rmoe("train", str(config), "--check")
    assert code == 0, errors
    assert not (tmp_path / "run").exists()


def test_the_whole_chain_on_a_tiny_model(tmp_path: Path) -> None:
    """Raw shards, encoders, training from raw and from precomputed shards, export, samples, scores."""
    shapes, encoded, config = tmp_path / "shapes", tmp_path / "encoded", tmp_path / "config.yaml"
    make_run(tmp_path)
    text = (
        config.read_text()
        .replace("sample_size: 8", "sample_size: 32")
        .replace("patch_size: 2", "patch_size: 8")
    )
    config.write_text(text.replace("text_length: 6", "text_length: 16").replace("steps: 20,", "steps: 4,"))
    settings = [f"run_dir={tmp_path}/run", f"data.train={encoded}/train", f"data.validation={encoded}/val"]
    raw = [f"run_dir={tmp_path}/raw", f"data.train={shapes}/train", f"data.validation={shapes}/val"]
    commands = [
        ["data", "build-shapes", str(shapes), "--train", "40", "--val", "24"],
        ["data", "precompute", str(config), str(shapes), str(encoded)],
        ["train", str(config), *settings],
        ["train", str(config), *raw],
        ["convert", "to-hf", f"{tmp_path}/run", f"{tmp_path}/model"],
        ["sample", f"{tmp_path}/model", "--prompt", "two red circles", "--steps", "2", "--out", f"{tmp_path}/images"],
        ["eval", "shapes", f"{tmp_path}/model", "--data", str(shapes), "--out", f"{tmp_path}/scores", "--steps", "1",
         "--images-per-prompt", "1"],
        ["sample", f"{tmp_path}/model", "--prompt", "a red circle", "--steps", "2", "--dtype", "fp32", "--out", f"{tmp_path}/grid"],
    ]  # fmt: skip
    for command in commands:
        code, errors = rmoe(*command)
        assert code == 0, errors
    # Half-precision storage of the embeddings is the only difference.
    assert losses(tmp_path / "raw") == pytest.approx(losses(tmp_path / "run"), rel=1e-3)
    with Image.open(tmp_path / "images" / "00000.png") as picture:
        assert picture.size == (32, 32)
        made_by = json.loads(picture.info["made_by"])
    assert (made_by["prompt"], made_by["steps"], made_by["guidance"]) == ("two red circles", 2, 2.0)
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert results["splits"]["seen"]["images"] == 24
    assert results["splits"]["heldout"]["images"] == 6
    assert results["detector_accuracy_on_ground_truth"] == 1.0
    assert_same_picture(tmp_path / "run" / "samples" / "step-00000004.png", tmp_path / "grid" / "grid.png")
    assert (tmp_path / "run" / "curves.png").is_file()


def test_the_readme_has_a_row_for_every_folder_and_names_what_is_there() -> None:
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("| where | what |") :].split("\n\n")[0]
    named = [
        word.strip("`") for row in table.splitlines() for word in re.findall(r"`[\w./*]+`", row.split("|")[1])
    ]
    package = ROOT / "rmoe_megatron"
    folders = {path.name for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= {name.rstrip("/").removeprefix("rmoe_megatron/") for name in named}
    for name in named:
        places = [place for root in (ROOT, package) for place in root.glob(name.rstrip("/"))]
        assert places, name
        assert all(place.is_dir() == name.endswith("/") for place in places), name


LOUD = """
import importlib.util, pathlib, sys
from rmoe_megatron.cli import main
sys.argv = ["rmoe", "sample", "/nowhere", "--prompt", "a", "--out", "/nowhere"]
try:
    main()
except SystemExit:
    pass
import transformers
transformers.SiglipImageProcessor
(megatron,) = importlib.util.find_spec("megatron").submodule_search_locations
file = pathlib.Path(megatron, "core", "inference", "contexts", "kv_block_allocator.py")
compile(file.read_text(), str(file), "exec")
"""


def test_commands_say_nothing_of_what_other_libraries_lack() -> None:
    """transformers warns of an image processor without torchvision, Python of escapes in a string of Megatron-Core."""
    done = subprocess.run([sys.executable, "-c", LOUD], capture_output=True, text=True, timeout=240)
    assert done.stderr.startswith("error: /nowhere")
    assert len(done.stderr.splitlines()) == 1, done.stderr
