"""DPG-Bench: its table, its scores by hand with and without the published quirks, and the whole of it."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rmoe_megatron.errors import UserError
from rmoe_megatron.evaluation.dpg.answering import MPLUG, Mplug, Spoken, load_answerer
from rmoe_megatron.evaluation.dpg.evaluate import Settings, evaluate_dpg, grid, tiles
from rmoe_megatron.evaluation.dpg.questions import Item, read_items
from rmoe_megatron.evaluation.dpg.scoring import score, worth
from rmoe_megatron.evaluation.rule_set import RuleSet
from rmoe_megatron.inference.generation import Sampling
from tests.support.judges import save_answerer
from tests.support.sd3_pipeline import save_pipeline

HEADER = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language\n"
# Two prompts: a cat that sleeps on a mat, and two dogs of which one is brown.
TABLE = HEADER + (
    "cat,a cat on a mat,,1,0,entity,whole,entity - whole (cat),Is there a cat?\n"
    "cat,a cat on a mat,,2,1,attribute,state,attribute - state (cat asleep),Is the cat asleep?\n"
    'cat,a cat on a mat,,3,0,entity,whole,entity - whole (mat),"Is there a mat, or a rug?"\n'
    'cat,a cat on a mat,,4,"1, 3",relation,spatial,"relation - spatial (cat, mat, on)",Is the cat on the mat?\n'
    "dogs,two dogs,,1,0,entity,whole,entity - whole (dogs),Are there dogs?\n"
    "dogs,two dogs,,2,1,attribute,color,attribute - color (brown),Is a dog brown?\n"
    "dogs,two dogs,,3,2,relation,spatial,relation - spatial (dog),Is the brown dog in front?\n"
)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "dpg_bench.csv").write_text(TABLE)
    return tmp_path / "dpg_bench.csv"


def test_the_table(table: Path) -> None:
    cat, dogs = read_items(table, RuleSet.fixed)
    assert (cat.name, cat.prompt, list(cat.propositions)) == ("cat", "a cat on a mat", [1, 2, 3, 4])
    assert cat.propositions[4].parents == (1, 3)
    assert cat.propositions[3].question == "Is there a mat, or a rug?"
    assert cat.propositions[4].category == "relation - spatial"
    assert [list(item.propositions) for item in read_items(table, RuleSet.official)] == [
        [2, 3, 4],
        [1, 2, 3],
    ]
    assert dogs.propositions[1].parents == ()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("item_id,text\n", "has no column proposition_id"),
        (HEADER, "has no row"),
        (HEADER + "../x,a,,1,0,e,w,t,q\n", "Row 1 of .* can name no image"),
        (HEADER + "x,a,,1,0,e,w,t,q\nx,a,,two,0,e,w,t,q\n", "Row 2 of .*proposition_id 'two'"),
    ],
)
def test_tables_of_others(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(UserError, match=words):
        read_items(tmp_path / "t.csv", RuleSet.official)


BLOCKS = HEADER + (
    "first,p,,1,0,e,w,e - w (a),q\nother,p,,1,0,e,w,e - w (a),q1\nother,p,,2,1,e,w,e - w (b),q2\n"
    "third,p,,1,0,e,w,e - w (a),q3\nother,p,,3,0,e,w,e - w (c),q4\n"
)


def test_an_item_in_two_blocks_keeps_the_last_one_as_published(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(BLOCKS)
    official, fixed = (read_items(tmp_path / "t.csv", each) for each in RuleSet)
    assert [(item.name, list(item.propositions)) for item in official] == [("other", [3]), ("third", [1])]
    assert [(item.name, list(item.propositions)) for item in fixed] == [
        ("first", [1]), ("other", [1, 2, 3]), ("third", [1]),
    ]  # fmt: skip


@pytest.mark.parametrize("names", [("7", "12"), ("0012", "-3"), ("1e3", "0.5")])
def test_items_that_are_numbers_are_scored_by_the_repaired_code_alone(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    """pandas reads a column of numbers as numbers, so that the published code finds none of them by the name of its picture."""
    rows = "".join(f"{name},p,,{number},0,e,w,e - w (a),q\n" for name in names for number in (1, 2))
    (tmp_path / "t.csv").write_text(HEADER + rows)
    assert [item.name for item in read_items(tmp_path / "t.csv", RuleSet.fixed)] == list(names)
    with pytest.raises(UserError, match="is a number.*--protocol fixed"):
        read_items(tmp_path / "t.csv", RuleSet.official)
    # A column with one text among the numbers is read as texts.
    (tmp_path / "t.csv").write_text(HEADER + rows + "cat,p,,1,0,e,w,e - w (a),q\n")
    assert [item.name for item in read_items(tmp_path / "t.csv", RuleSet.official)] == [*names, "cat"]


def test_an_item_with_a_dot_in_its_name_is_left_out_as_published(tmp_path: Path) -> None:
    rows = "".join(f"{name},p,,{number},0,e,w,e - w (a),q\n" for name in ("a", "a.b") for number in (1, 2))
    (tmp_path / "t.csv").write_text(HEADER + rows)
    answers = [[{1: "yes", 2: "yes"}], [{1: "no", 2: "no"}]]
    official, fixed = (score(read_items(tmp_path / "t.csv", each), answers, each) for each in RuleSet)
    assert (official["overall"], official["prompts_left_out"]) == (100, ["a.b"])
    assert (fixed["overall"], fixed["prompts_left_out"]) == (50, [])


def test_what_depends_on_a_no_is_worth_nothing(table: Path) -> None:
    cat, dogs = read_items(table, RuleSet.fixed)
    assert worth(cat, {1: "no", 2: "yes", 3: "yes", 4: "yes"}) == {1: 0, 2: 0, 3: 1, 4: 0}
    # A parent that is worth nothing for its own parent's sake takes its children along.
    assert worth(dogs, {1: "no", 2: "yes", 3: "yes"}) == {1: 0, 2: 0, 3: 0}
    assert worth(dogs, {1: "yes", 2: "yes", 3: "a yes"}) == {1: 1, 2: 1, 3: 0}


def test_a_parent_is_looked_at_as_it_stands_in_the_order_of_the_table(tmp_path: Path) -> None:
    rows = "x,p,,3,2,e,w,e - w (a),q\nx,p,,2,1,e,w,e - w (b),q\nx,p,,1,0,e,w,e - w (c),q\n"
    (tmp_path / "t.csv").write_text(HEADER + rows)
    (item,) = read_items(tmp_path / "t.csv", RuleSet.fixed)
    # 3 looks at 2 before 2 has lost its worth to 1.
    assert worth(item, {1: "no", 2: "yes", 3: "yes"}) == {3: 1, 2: 0, 1: 0}


CAT = [{1: "yes", 2: "no", 3: "yes", 4: "yes"}, {1: "no", 2: "yes", 3: "yes", 4: "yes"}]
DOGS = [{1: "yes", 2: "yes", 3: "yes"}, {1: "no", 2: "yes", 3: "no"}]


def test_scores_by_hand(table: Path) -> None:
    fixed = score(read_items(table, RuleSet.fixed), [CAT, DOGS], RuleSet.fixed)
    assert fixed["overall"] == pytest.approx(100 * ((3 / 4 + 1 / 4) / 2 + (1 + 0) / 2) / 2)
    # Worth, over both images of both prompts.
    assert fixed["categories_l2"] == pytest.approx({
        "entity - whole": 100 * (2 + 1 + 1 + 0) / 6, "attribute - state": 0, "attribute - color": 50,
        "relation - spatial": 100 * (1 + 0 + 1 + 0) / 4,
    })  # fmt: skip
    assert fixed["categories_l1"]["attribute"] == pytest.approx(25)
    assert fixed["prompts_left_out"] == []
    # The published code does not ask the first row; the first prompt depends on it and drops out, categories included.
    official = score(read_items(table, RuleSet.official), [CAT, DOGS], RuleSet.official)
    assert official["overall"] == pytest.approx(50)
    assert official["prompts_left_out"] == ["cat"]
    # Answers of the last image, whatever they depend on.
    assert official["categories_l2"] == {
        "attribute - color": 100,
        "entity - whole": 0,
        "relation - spatial": 0,
    }


def test_grids_are_cut_as_they_were_put_together() -> None:
    images = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue", "white")]
    whole = grid(images)
    assert whole.size == (8, 8)
    assert [tile.getpixel((1, 1)) for tile in tiles(whole, 4)] == [image.getpixel((0, 0)) for image in images]
    assert whole.getpixel((7, 0)) == images[1].getpixel((0, 0))  # the second is right of the first
    assert tiles(grid(images[:1]), 1)[0].size == (4, 4)


def test_mplug_is_modelscopes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []

    def pipeline(task: str, model: str, device: str) -> Any:
        made.append((task, model, device))
        return lambda question: {"text": f"{question['question']} no"}

    for name, members in (
        ("modelscope", {}),
        ("modelscope.pipelines", {"pipeline": pipeline}),
        ("modelscope.utils", {}),
        ("modelscope.utils.constant", {"Tasks": types.SimpleNamespace(visual_question_answering="vqa")}),
    ):
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    assert load_answerer("mplug", "cpu").answer(Image.new("RGB", (2, 2)), "cat?") == "cat? no"
    assert made == [("vqa", MPLUG, "cpu")]


def test_without_modelscope_the_other_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    monkeypatch.delitem(sys.modules, "modelscope.pipelines", raising=False)
    with pytest.raises(UserError, match="pip install modelscope.*--answerer"):
        Mplug("cpu")


def test_the_more_probable_word_is_the_answer() -> None:
    class Letters:
        def __init__(self, yes: float, no: float) -> None:
            self.probabilities = torch.zeros(128)
            self.probabilities[ord("y")], self.probabilities[ord("N")] = yes, no

        def first_token(self, image: Image.Image, question: str) -> torch.Tensor:
            assert question == "Is it? Answer yes or no."
            return self.probabilities

        def first_token_of(self, word: str) -> int:
            return ord(word[0])

        def spell(self, token: int) -> str:
            return chr(token)

    image = Image.new("RGB", (2, 2))
    assert Spoken(Letters(0.4, 0.3)).answer(image, "Is it?") == "yes"
    assert Spoken(Letters(0.3, 0.4)).answer(image, "Is it?") == "no"


def test_the_whole(table: Path, tmp_path: Path) -> None:
    save_pipeline(tmp_path / "model")
    save_answerer(tmp_path / "answerer")
    items: list[Item] = read_items(table, RuleSet.fixed)
    settings = Settings(tmp_path / "out", 4, RuleSet.fixed, str(tmp_path / "answerer"))
    evaluate_dpg(items, Sampling(str(tmp_path / "model"), 1, 7.0, 0, 3), settings, lambda title: None)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "not comparable" in results["differences"][0]
    assert results["prompts"] == 2
    whole = Image.open(tmp_path / "out" / "images" / "dogs.png")
    tile = Image.open(tmp_path / "out" / "tiles" / "dogs" / "3.png")
    assert whole.size == (2 * tile.width, 2 * tile.height)
    assert tiles(whole, 4)[3].tobytes() == tile.convert("RGB").tobytes()
    answers = json.loads((tmp_path / "out" / "answers" / "cat.fixed.json").read_text())
    assert [set(each) for each in answers] == [{"1", "2", "3", "4"}] * 4
    given = Settings(tmp_path / "given", 4, RuleSet.fixed, str(tmp_path / "answerer"))
    evaluate_dpg(items, Sampling(str(tmp_path / "out" / "images"), 1, 7.0, 0, 3), given, lambda title: None)
    again = json.loads((tmp_path / "given" / "results.json").read_text())
    assert again["overall"] == results["overall"]
    (tmp_path / "out" / "images" / "cat.png").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 2 images, cat\.png the first"):
        evaluate_dpg(
            items, Sampling(str(tmp_path / "out" / "images"), 1, 7.0, 0, 3), given, lambda title: None
        )
