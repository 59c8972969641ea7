"""What lies in --out is of this evaluation, or it is refused by name, or made anew: pictures, verdicts and results."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.comparison.result_files import read_entries
from rmoe_megatron.evaluation.dpg.evaluate import Settings as DpgSettings
from rmoe_megatron.evaluation.dpg.evaluate import evaluate_dpg
from rmoe_megatron.evaluation.dpg.questions import is_published, read_items
from rmoe_megatron.evaluation.geneval.evaluate import require_metadata
from rmoe_megatron.evaluation.geneval.prompts import is_official, make_prompts
from rmoe_megatron.evaluation.geneval2.evaluate import Settings, evaluate_geneval2
from rmoe_megatron.evaluation.geneval2.prompts import Prompt
from rmoe_megatron.evaluation.geneval2.prompts import is_official as is_official_geneval2
from rmoe_megatron.evaluation.results import standard_error
from rmoe_megatron.evaluation.rule_set import RuleSet
from rmoe_megatron.files import atomic
from rmoe_megatron.files.sha256 import sha256_of
from rmoe_megatron.inference.fingerprints import model_digest
from rmoe_megatron.inference.generation import Sampling
from rmoe_megatron.inference.provenance import Product, differences, png_with, read_record, require_records
from rmoe_megatron.pretrained.hub import is_of_the_hub
from rmoe_megatron.versions import code_fingerprint, versions_of
from tests.evaluation.test_dpg import TABLE
from tests.support.judges import save_answerer
from tests.support.sd3_pipeline import save_pipeline

CAT: Prompt = {
    "prompt": "a cat",
    "atom_count": 3,
    "vqa_list": [["Is there a cat?", "Yes"]],
    "skills": ["object"],
}
CIRCLES: Prompt = {
    "prompt": "two red circles", "atom_count": 3, "vqa_list": [["How many circles are in the image?", "two"]], "skills": ["count"],
}  # fmt: skip


def write(path: Path, record: dict[str, Any]) -> None:
    product = Product(path, lambda: record)
    image = Image.new("RGB", (4, 4), "red")
    product.write(png_with(image, product.record) if path.suffix == ".png" else b"[]")


@pytest.mark.parametrize("name", ["a.png", "a.json", "a.npy"])
def test_a_file_carries_what_made_it(tmp_path: Path, name: str) -> None:
    path, record = tmp_path / "out" / name, {"prompt": 'ein "Bär"', "steps": 2, "weights": {"vae": "12"}}
    product = Product(path, lambda: record)
    assert not product.is_made
    assert product.differences() == []
    write(path, record)
    assert product.is_made
    assert read_record(path) == record
    other = Product(path, lambda: record | {"steps": 3, "weights": {"vae": "13"}, "size": 8})
    assert not other.is_made
    found = ["steps 2 instead of 3", 'weights vae "12" instead of "13"', "size nothing instead of 8"]
    assert other.differences() == found
    with pytest.raises(UserError, match=f"{name} was made by another command .steps 2 instead of 3"):
        require_records([product, other], again=False)
    require_records([product, other], again=True)
    write(path, record | {"steps": 3})
    assert not Product(path, lambda: record).is_made


def test_a_file_that_says_nothing_is_nobodys(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text("[]")
    for name in ("a.png", "a.json"):
        product = Product(tmp_path / name, lambda: {"steps": 1})
        assert not product.is_made
        with pytest.raises(
            UserError, match=f"{name} was made by another command .it does not say what made it"
        ):
            require_records([product], again=False)


def test_a_file_never_has_the_record_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is left when the process ends between record and file."""
    path = tmp_path / "a.json"
    write(path, {"steps": 1})
    written, writing = [], atomic.writing

    @contextmanager
    def interrupted(target: Path) -> Iterator[Path]:
        written.append(target)
        if len(written) == 2:
            raise KeyboardInterrupt
        with writing(target) as partial:
            yield partial

    monkeypatch.setattr(atomic, "writing", interrupted)
    product = Product(path, lambda: {"steps": 2})
    with pytest.raises(KeyboardInterrupt):
        product.write(b"[]")
    assert not product.is_made
    assert not path.exists()


def test_differences_are_named_in_order() -> None:
    assert differences({"a": 1, "b": {"c": 1, "d": 2}}, {"a": 1, "b": {"c": 2, "d": 2}}) == [
        "b c 1 instead of 2"
    ]
    assert differences({"a": {"b": 1}}, {"a": None}) == ['a {"b": 1} instead of nothing']
    assert differences({"a": 1.0}, {"a": 1}) == []


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_pipeline(folder / "sd3")
    save_answerer(folder / "answerer")
    for name, weights in {"sd3": "transformer/diffusion_pytorch_model", "answerer": "model"}.items():
        shutil.copytree(folder / name, folder / f"other-{name}")
        change_weights(folder / f"other-{name}" / f"{weights}.safetensors")
    return folder


def change_weights(path: Path) -> None:
    generator = torch.Generator().manual_seed(9)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.3
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def score(
    models: Path, out: Path, prompts: list[Prompt] | None = None, model: str = "sd3", answerer: str = "answerer",
    protocol: RuleSet = RuleSet.official, again: bool = False, **sampling: Any,
) -> dict[str, Any]:  # fmt: skip
    """Score by GenEval 2, whose judge is quick; returns the results."""
    settings = Settings(out, protocol, str(models / answerer), again)
    how = replace(Sampling(str(models / model), 1, 7.0, 0, 2), **sampling)
    evaluate_geneval2(prompts or [CAT], how, settings, lambda title: None)
    return json.loads((out / "results.json").read_text())


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"model": "other-sd3"}, "sampling weights transformer"),
    "prompt": ({"prompts": [CIRCLES]}, "prompt_set sha256"),
    "number": ({"prompts": [CAT, CIRCLES]}, "prompt_set number 1 instead of 2"),
    "seed": ({"seed": 1}, "sampling seed 0 instead of 1"),
    "steps": ({"steps": 2}, "sampling steps 1 instead of 2"),
    "guidance": ({"guidance": 5.0}, r"sampling guidance 7\.0 instead of 5\.0"),
    "interval": ({"guidance_interval": (0.5, 1.0)}, "sampling guidance_interval"),
    "sampler": (
        {"scheduler": "dpm"},
        'sampling sampler class "FlowMatchEulerDiscreteScheduler" instead of "DPMSolver',
    ),
    "negative": ({"negative_prompt": "a dog"}, "sampling negative_prompt nothing instead of"),
    "data type": ({"dtype": "bf16"}, 'sampling dtype "fp32" instead of "bf16"'),
    "judge": ({"answerer": "other-answerer"}, "judge answerer_sha256"),
    "protocol": ({"protocol": RuleSet.fixed}, 'protocol "official" instead of "fixed"'),
}


@pytest.fixture(scope="module")
def scored(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored") / "out"
    score(models, out)
    return out


def content(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for kind in ("images/*.png", "scores/*.json", "results.json")
        for path in out.glob(kind)
    }


@pytest.mark.parametrize("name", CHANGES)
def test_another_evaluation_is_refused_by_name(models: Path, scored: Path, tmp_path: Path, name: str) -> None:
    change, words = CHANGES[name]
    before = content(scored)
    with pytest.raises(UserError, match=f"holds another evaluation .*{words}"):
        score(models, scored, **change)
    assert content(scored) == before
    # What was interrupted has no results yet; then a picture or a verdict says that it is another's.
    out = tmp_path / "out"
    shutil.copytree(scored, out)
    (out / "results.json").unlink()
    if name in ("number", "protocol"):  # more of the same kind: what is there stays and is part of it
        score(models, out, **change)
        assert all(
            content(out)[key] == before[key] for key in ("images/00000.png", "scores/00000.official.json")
        )
        return
    with pytest.raises(
        UserError, match=r"was made by another command .*; choose another --out, or add --again"
    ):
        score(models, out, **change)


@pytest.mark.parametrize("name", ["weights", "judge", "number", "prompt"])
def test_again_makes_what_differs_and_keeps_the_rest(
    models: Path, scored: Path, tmp_path: Path, name: str
) -> None:
    change, _ = CHANGES[name]
    out = tmp_path / "out"
    shutil.copytree(scored, out)
    picture = out / "images" / "00000.png"
    before = picture.stat().st_mtime_ns
    again = score(models, out, again=True, **change)
    fresh = score(models, tmp_path / "fresh", **change)
    assert again == fresh
    assert content(out) == content(tmp_path / "fresh")
    assert (picture.stat().st_mtime_ns == before) is (name in ("judge", "number"))


def test_a_model_that_has_moved_is_the_same_and_one_in_its_place_is_not(
    models: Path, scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(scored, out)
    before = (out / "images" / "00000.png").stat().st_mtime_ns
    for where, folder in (("one", "sd3"), ("two", "other-sd3")):
        shutil.copytree(models / folder, tmp_path / where / "model")
    monkeypatch.chdir(tmp_path / "one")
    settings = Settings(out, RuleSet.official, str(models / "answerer"))
    sampling = Sampling("model", 1, 7.0, 0, 2)
    evaluate_geneval2([CAT], sampling, settings, lambda title: None)
    assert (out / "images" / "00000.png").stat().st_mtime_ns == before
    monkeypatch.chdir(tmp_path / "two")  # the same words, another model
    with pytest.raises(UserError, match="sampling weights transformer"):
        evaluate_geneval2([CAT], sampling, settings, lambda title: None)


def test_what_fails_claims_nothing(models: Path, tmp_path: Path) -> None:
    for wrong in ({"model": "sd4"}, {"scheduler": "ddim"}, {"answerer": "nobody"}):
        with pytest.raises(UserError):
            score(models, tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()
    score(models, tmp_path / "out")


def test_results_say_all_of_it(models: Path, scored: Path) -> None:
    results = json.loads((scored / "results.json").read_text())
    assert results["model"] == str(models / "sd3")
    sampling = results["sampling"]
    assert sampling["weights"]["pipeline"] == "StableDiffusion3Pipeline"
    assert sampling["weights"]["transformer"] == model_digest(models / "sd3" / "transformer")
    assert sampling["sampler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    assert sampling["sampler"]["shift"] == 3.0
    assert {key: sampling[key] for key in ("steps", "guidance", "seed", "dtype", "negative_prompt", "compile", "device")} == {
        "steps": 1, "guidance": 7.0, "seed": 0, "dtype": "fp32", "negative_prompt": None, "compile": False, "device": "cpu",
    }  # fmt: skip
    assert results["judge"]["answerer_sha256"] == model_digest(models / "answerer")
    assert sampling["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert code_fingerprint() in sampling["versions"]["rmoe-megatron"]
    assert results["standard_error"] is None  # of one prompt
    (of_prompts,) = results["prompt_scores"].values()
    assert of_prompts == {"00000 a cat": pytest.approx(results["soft_tifa_gm"])}
    (entry,) = read_entries(scored)  # what compares results reads it
    assert (entry.score, entry.prompt_scores) == (results["soft_tifa_gm"], results["prompt_scores"])
    record = read_record(scored / "images" / "00000.png")
    assert record is not None
    assert (record["prompt"], record["weights"]) == ("a cat", sampling["weights"])


def test_pictures_of_a_folder_are_of_the_prompts_that_they_say(
    models: Path, scored: Path, tmp_path: Path
) -> None:
    settings = Settings(tmp_path / "given", RuleSet.official, str(models / "answerer"))
    given = Sampling(str(scored / "images"), 1, 7.0, 0, 2)
    with pytest.raises(
        UserError, match=r"00000\.png was made of 'a cat', but is to be scored as 'two red circles'"
    ):
        evaluate_geneval2([CIRCLES], given, settings, lambda title: None)
    evaluate_geneval2([CAT], given, settings, lambda title: None)
    results, first = (json.loads((out / "results.json").read_text()) for out in (tmp_path / "given", scored))
    assert results["sampling"]["made_by"] == first["sampling"]
    assert results["soft_tifa_am"] == first["soft_tifa_am"]
    # Another picture in its place is another evaluation.
    shutil.copytree(scored / "images", tmp_path / "images")
    moved = replace(given, model=str(tmp_path / "images"))
    evaluate_geneval2([CAT], moved, settings, lambda title: None)
    Image.fromarray(np.full((16, 16, 3), 7, dtype=np.uint8)).save(tmp_path / "images" / "00000.png")
    with pytest.raises(UserError, match="holds another evaluation .sampling images"):
        evaluate_geneval2([CAT], moved, settings, lambda title: None)


def test_a_folder_of_geneval_says_its_prompts(tmp_path: Path) -> None:
    prompts = make_prompts()[:2]
    for number, metadata in enumerate(prompts):
        (tmp_path / f"{number:05d}").mkdir()
        (tmp_path / f"{number:05d}" / "metadata.jsonl").write_text(json.dumps(metadata))
    require_metadata(prompts, tmp_path)
    with pytest.raises(
        UserError, match=f"says '{prompts[0]['prompt']}', but prompt 0 is '{prompts[1]['prompt']}'"
    ):
        require_metadata(prompts[::-1], tmp_path)
    require_metadata(prompts, tmp_path / "nothing")


def test_a_set_is_the_published_one_by_its_words(tmp_path: Path) -> None:
    prompts = make_prompts()
    assert is_official(prompts)
    assert not is_official([{**prompts[0], "prompt": "a photo of a chair"}, *prompts[1:]])
    assert not is_official_geneval2([CAT] * 800)
    (tmp_path / "table.csv").write_text(TABLE)
    assert not is_published(tmp_path / "table.csv")


def test_single_pictures_are_not_cut(models: Path, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(TABLE)
    items = read_items(tmp_path / "table.csv", RuleSet.fixed)
    for name, side in (("even", 32), ("odd", 33)):
        (tmp_path / name).mkdir()
        for number, item in enumerate(items):
            pixels = np.random.default_rng([side, number]).integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{item.name}.png")

    def dpg(folder: str, number: int | None) -> dict[str, Any]:
        out = tmp_path / f"{folder}-{number}"
        settings = DpgSettings(out, number, RuleSet.fixed, str(models / "answerer"))
        evaluate_dpg(items, Sampling(str(tmp_path / folder), 1, 7.0, 0, 2), settings, lambda title: None)
        return json.loads((out / "results.json").read_text())

    with pytest.raises(UserError, match="do not say what they are; give --images-per-prompt 4 for grids"):
        dpg("even", None)
    with pytest.raises(UserError, match="33 x 33 pixels is no grid of two by two"):
        dpg("odd", 4)
    assert dpg("odd", 1)["cut"] == "not at all: 33 x 33 pixels are one image"
    assert dpg("even", 4)["cut"] == "32 x 32 pixels into four tiles of 16 x 16"
    # Those that were made here say themselves what they are.
    evaluate_dpg(
        items, Sampling(str(models / "sd3"), 1, 7.0, 0, 2),
        DpgSettings(tmp_path / "made", 1, RuleSet.fixed, str(models / "answerer")), lambda title: None,
    )  # fmt: skip
    shutil.copytree(tmp_path / "made" / "images", tmp_path / "own")
    assert dpg("own", None)["images_per_prompt"] == 1
    with pytest.raises(UserError, match="holds 1 images, not 4"):
        dpg("own", 4)


def test_the_standard_error_is_that_of_prompts() -> None:
    """The bootstrap's in closed form: the prompts' variance over their number, task by task."""
    rng = np.random.default_rng(0)
    groups = [rng.uniform(size=40), rng.uniform(size=10) * 3, rng.integers(0, 2, 25).astype(float)]
    expected = np.sqrt(sum(np.var(group) / len(group) for group in groups)) / len(groups)
    scores = {str(task): dict(enumerate(group.tolist())) for task, group in enumerate(groups)}
    assert standard_error(scores) == pytest.approx(expected, rel=0.05)
    assert standard_error({"a": {"p": 1.0, "q": 1.0}}) == 0
    assert standard_error({"a": {"p": 0.5}}) is None
    assert standard_error({"a": {"p": 0.5, "q": 1.0}, "b": {"p": 0.5}}) is None
    assert standard_error({}) is None


def test_a_local_folder_of_the_hubs_name_is_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_of_the_hub("owner/model", "owner/model")
    assert not is_of_the_hub("owner/other", "owner/model")
    (tmp_path / "owner" / "model").mkdir(parents=True)
    assert not is_of_the_hub("owner/model", "owner/model")


def test_a_digest_is_of_what_is_loaded(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "sd3" / "text_encoder", tmp_path / "clip")
    before = model_digest(tmp_path / "clip")
    assert before == model_digest(models / "sd3" / "text_encoder")
    (tmp_path / "clip" / "README.md").write_text("about it")
    path = tmp_path / "clip" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": "elsewhere"}))
    assert model_digest(tmp_path / "clip") == before
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu"}))
    assert model_digest(tmp_path / "clip") != before


def test_a_file_that_changes_within_the_clocks_grain_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    first = sha256_of(path)
    path.write_bytes(b"two")
    os.utime(path, ns=times)
    assert sha256_of(path) != first


def test_versions_leave_out_what_is_not_installed() -> None:
    assert list(versions_of("torch", "no-such-library")) == ["rmoe-megatron", "torch"]
