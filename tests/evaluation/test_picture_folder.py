"""Folders of images: everything that is wrong with one is found, named and refused, or counted."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.geneval2.evaluate import Settings, evaluate_geneval2
from rmoe_megatron.evaluation.geneval2.prompts import Prompt
from rmoe_megatron.evaluation.limits import of_a_part, take_in_turn
from rmoe_megatron.evaluation.picture_folder import inspect_folder, require_pictures
from rmoe_megatron.inference.generation import Sampling
from tests.support.judges import save_answerer


def picture(path: Path, seed: int, size: tuple[int, int] = (16, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def spoilt(folder: Path, prompts: int = 8) -> list[Path]:
    """A folder with one fault of every kind; returns what it should hold."""
    wanted = [folder / f"{number:05d}.png" for number in range(prompts)]
    for number, path in enumerate(wanted):
        picture(path, number)
    wanted[1].unlink()
    wanted[2].write_bytes(wanted[2].read_bytes()[:-60])
    Image.new("RGB", (16, 16)).save(wanted[3])
    picture(wanted[4], 0)  # as 0
    picture(wanted[5], 5, size=(32, 8))
    picture(folder / f"{prompts:05d}.png", 70)
    picture(folder / "notes" / "plot.png", 71)
    (folder / "readme.txt").write_text("no picture")
    return wanted


def test_every_fault_is_found(tmp_path: Path) -> None:
    report = inspect_folder(spoilt(tmp_path), tmp_path)
    assert report.problems() == {
        "missing": ["00001.png"],
        "unreadable": ["00002.png"],
        "black": ["00003.png"],
        "duplicate": ["00004.png (as 00000.png)"],
        "of_another_size": ["00005.png (32 x 8)"],
        "too_many": ["00008.png"],
        "foreign": ["notes/plot.png"],
    }


def test_what_can_be_scored_is_scored_only_if_that_is_asked_for(tmp_path: Path) -> None:
    wanted = spoilt(tmp_path)
    with pytest.raises(
        UserError, match="it lacks 1 of 8 images, 00001.png the first; 1 cannot be read, 00002.png"
    ):
        require_pictures(wanted, tmp_path, allow_incomplete=False)
    usable, _ = require_pictures(wanted, tmp_path, allow_incomplete=True)
    assert usable == [path for number, path in enumerate(wanted) if number not in (1, 2)]
    with pytest.raises(UserError, match="holds none of the 1 images"):
        require_pictures([tmp_path / "nothing.png"], tmp_path, allow_incomplete=True)


def test_a_good_folder_and_a_part_of_one(tmp_path: Path) -> None:
    wanted = [tmp_path / f"{number}.png" for number in range(6)]
    for number, path in enumerate(wanted):
        picture(path, number)
    assert inspect_folder(wanted, tmp_path).problems() == {}
    assert inspect_folder(wanted[::2], tmp_path, layout=wanted).problems() == {}
    assert inspect_folder(wanted[::2], tmp_path).problems() == {"too_many": ["1.png", "3.png", "5.png"]}


def test_the_same_bytes_in_another_shape_are_another_picture(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 3), dtype=np.uint8)
    for name, shape in (("wide", (4, 16, 3)), ("high", (16, 4, 3))):
        Image.fromarray(pixels.reshape(shape)).save(tmp_path / f"{name}.png")
    report = inspect_folder([tmp_path / "wide.png", tmp_path / "high.png"], tmp_path)
    assert list(report.problems()) == ["of_another_size"]


def prompts(number: int) -> list[Prompt]:
    return [
        {"prompt": f"{each} cats", "atom_count": 3 + each % 2, "vqa_list": [["Are there cats?", "Yes"]], "skills": ["object"]}
        for each in range(number)
    ]  # fmt: skip


def test_a_folder_is_refused_or_its_faults_are_counted(tmp_path: Path) -> None:
    spoilt(tmp_path / "images")
    save_answerer(tmp_path / "answerer")
    given = Sampling(str(tmp_path / "images"), 1, 7.0, 0, 1)
    settings = Settings(tmp_path / "out", answerer=str(tmp_path / "answerer"))
    with pytest.raises(UserError, match="add --allow-incomplete"):
        evaluate_geneval2(prompts(8), given, settings, lambda title: None)
    assert not settings.out.exists()
    evaluate_geneval2(prompts(8), given, replace(settings, allow_incomplete=True), lambda title: None)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["prompts"] == 6
    assert results["sampling"]["folder"]["unreadable"] == ["00002.png"]
    assert results["differences"][-1] == (
        "the folder's images are not all as they should be: 1 missing, 1 unreadable, 1 black, 1 duplicate, 1 of another size, "
        "1 too many, 1 foreign"
    )


def test_a_limit_takes_the_tasks_in_turn() -> None:
    tasks = ["a"] * 4 + ["b"] + ["c"] * 3
    assert take_in_turn(tasks, None) is None
    assert take_in_turn(tasks, 8) is None
    assert take_in_turn(tasks, 3) == (0, 4, 5)
    assert take_in_turn(tasks, 5) == (0, 1, 4, 5, 6)
    assert take_in_turn(tasks, 7) == (0, 1, 2, 4, 5, 6, 7)
    assert of_a_part({"overall": 0.5}, None, 8) == {"overall": 0.5}
    assert of_a_part({"overall": 0.5}, (1, 2), 8) == {
        "overall": None, "limited": {"prompts": 2, "of": 8, "overall": 0.5},
    }  # fmt: skip


def test_a_part_of_a_folder_is_of_the_prompts_with_their_own_numbers(tmp_path: Path) -> None:
    """Six prompts of two atomicities in turn: with a limit of three it is 0, 1 and 2, whose pictures are their own."""
    ordered = sorted(prompts(6), key=lambda prompt: prompt["atom_count"])
    for number in range(6):
        picture(tmp_path / "images" / f"{number:05d}.png", number)
    save_answerer(tmp_path / "answerer")
    chosen = take_in_turn([prompt["atom_count"] for prompt in ordered], 2)
    assert chosen == (0, 3)
    scores = {}
    for name, numbers in (("whole", None), ("part", chosen)):
        settings = Settings(tmp_path / name, answerer=str(tmp_path / "answerer"), chosen=numbers)
        evaluate_geneval2(
            ordered, Sampling(str(tmp_path / "images"), 1, 7.0, 0, 1), settings, lambda title: None
        )
        results = json.loads((tmp_path / name / "results.json").read_text())
        scores[name] = results["prompt_scores"]["prompts"]
    assert len(scores["part"]) == 2
    assert scores["part"] == {prompt: scores["whole"][prompt] for prompt in scores["part"]}
    assert results["soft_tifa_gm"] is None
    assert results["limited"]["soft_tifa_gm"] == pytest.approx(np.mean(list(scores["part"].values())))
    assert (results["limited"]["prompts"], results["limited"]["of"]) == (2, 6)
    assert "2 of 6 prompts" in (tmp_path / "part" / "results.md").read_text()
