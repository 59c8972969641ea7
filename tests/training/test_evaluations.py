"""Benchmarks between steps: a perfect model scores one, verdicts add up, ranks share the work, a run logs and draws it, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rmoe_megatron.checkpoint.folders import forget_pending
from rmoe_megatron.config.run import EvaluationConfig, TrainingConfig
from rmoe_megatron.data.batch import Conditions, Prompts, TextConditions
from rmoe_megatron.data.mazes.build import build_mazes
from rmoe_megatron.data.shapes.build import make_scene
from rmoe_megatron.data.shapes.render import render
from rmoe_megatron.data.shapes.vocabulary import HELDOUT_PAIRS
from rmoe_megatron.data.shards.dataset import ShardDataset
from rmoe_megatron.encoders.autoencoder import encode_images, load_autoencoder
from rmoe_megatron.evaluation.geneval.evaluate import Judges
from rmoe_megatron.evaluation.geneval.rules import Detection
from rmoe_megatron.training.benchmarks import Benchmark, open_benchmark
from rmoe_megatron.training.evaluations import Evaluation
from tests.evaluation.test_corebench import save_tables
from tests.evaluation.test_dpg import TABLE
from tests.evaluation.test_mazes import REGION
from tests.support.commands import rmoe
from tests.support.configurations import one_rank, tiny_config
from tests.support.judges import save_answerer, save_clip, save_detector
from tests.support.runs import losses, make_run

SIDE = 32
METADATA = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of two cats"},
    {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "a photo of two dogs"},
]  # fmt: skip
CAT = {"prompt": "a cat", "atom_count": 3, "vqa_list": [["Is there a cat?", "Yes"]], "skills": ["object"]}


@pytest.mark.parametrize("wrong", [0, 3])
def test_a_model_that_draws_the_scenes_scores_one(wrong: int) -> None:
    """Its velocity leads from any noise to the scene of the caption, which it knows by its number; some captions it mistakes."""
    training = TrainingConfig(
        steps=1, micro_batch_size=1, global_batch_size=1, sample_steps=4, sample_guidance=1.0
    )
    config = tiny_config(training=training)
    benchmark = open_benchmark(EvaluationConfig("shapes", limit=35))
    scenes = [
        make_scene(0, split, number, frozenset(HELDOUT_PAIRS))
        for split in ("val", "val_heldout")
        for number in range(35)
    ]
    assert benchmark.captions == [scene.caption for scene in scenes]
    autoencoder = load_autoencoder("pixel", torch.device("cpu"))
    drawn = np.stack([render(scene.objects) for scene in scenes])
    blank = np.full_like(drawn[:1], 40)
    pixels = torch.from_numpy(np.concatenate((drawn, blank))).permute(0, 3, 1, 2)
    targets = encode_images(autoencoder, pixels)
    number = torch.arange(len(scenes)).float().view(-1, 1)
    null = TextConditions(torch.zeros(1, 1, 1), torch.full((1, 1), -1.0))
    prompts = Prompts(benchmark.captions, TextConditions(torch.zeros(len(scenes), 1, 1), number), null)

    def denoise(latents: Tensor, timestep: Tensor, keys: Tensor, conditions: Conditions) -> Tensor:
        assert isinstance(conditions, TextConditions)
        asked = conditions.text_pooled[:, 0].long()
        asked = torch.where((asked >= 0) & (asked < wrong), torch.tensor(-1), asked)
        return (latents - targets[asked]) / (timestep / 1000).view(-1, 1, 1, 1)

    with one_rank(config):
        evaluated = Evaluation(config, benchmark, prompts, autoencoder).run(denoise, SIDE, SIDE)
    assert evaluated is not None
    # Six skills in turn: of 35 scenes the first ones are of skills with six scenes each, but the last skill has five.
    expected = 1 - wrong / 6 / 6
    assert evaluated.metrics["shapes_seen"] == pytest.approx(expected)
    assert evaluated.metrics["shapes_heldout"] == 1
    assert evaluated.picture.width > 300


def summarised(name: str, data: Path | None, models: Any, images: int, limit: int = 6) -> dict[str, float]:
    """The metrics of a benchmark whose pictures have their numbers as values."""
    benchmark = open_benchmark(EvaluationConfig(name, limit=limit, data=None if data is None else str(data)))
    assert len(benchmark.captions) == images
    pictures = np.stack([np.full((16, 16, 3), number, dtype=np.uint8) for number in range(images)])
    verdicts = [benchmark.judge(models, number, picture) for number, picture in enumerate(pictures)]
    verdicts = json.loads(json.dumps(verdicts))  # they go from rank to rank
    evaluated = benchmark.summarise(verdicts, pictures)
    assert evaluated.picture.width > 100
    return evaluated.metrics


def number_of(image: Image.Image) -> int:
    return int(np.asarray(image)[0, 0, 0])


def test_geneval_by_hand(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(each) + "\n" for each in METADATA))
    seen = [{"bench": 1}, {"cat": 2}, {"dog": 1}]

    class Detector:
        def detect(self, image: Image.Image) -> dict[str, list[Detection]]:
            found = seen[number_of(image)].items()
            return {name: [Detection((0.0, 0.0, 4.0, 4.0), 0.95)] * count for name, count in found}

    judges = Judges(Detector(), None)  # type: ignore[arg-type]
    assert summarised("geneval", tmp_path / "metadata.jsonl", judges, 3) == {
        "geneval_overall": 0.75, "geneval_single_object": 1.0, "geneval_counting": 0.5,
    }  # fmt: skip


def test_geneval2_by_hand(tmp_path: Path) -> None:
    dogs = {"prompt": "two dogs", "atom_count": 4, "skills": ["object", "count"], "vqa_list": [["Are there dogs?", "Yes"], ["How many dogs?", "two"]]}  # fmt: skip
    (tmp_path / "data.jsonl").write_text(json.dumps(CAT) + "\n" + json.dumps(dogs) + "\n")

    class Answerer:
        """Yes with 1/2 for the first picture and 1/4 for the second, and two with 1/16."""

        def first_token(self, image: Image.Image, question: str) -> Tensor:
            probabilities = torch.zeros(128)
            probabilities[ord("Y")] = 0.5 if number_of(image) == 0 else 0.25
            probabilities[ord("t")] = 0.0625
            return probabilities

        def first_token_of(self, word: str) -> int:
            return ord(word[0])

        def spell(self, token: int) -> str:
            return chr(token)

    assert summarised("geneval2", tmp_path / "data.jsonl", Answerer(), 2) == pytest.approx(
        {
            "geneval2_soft_tifa_gm": 100 * (0.5 + 0.125) / 2, "geneval2_soft_tifa_am": 100 * (0.5 + 0.15625) / 2,
            "geneval2_object": 37.5, "geneval2_count": 6.25,
        }
    )  # fmt: skip


def test_dpg_by_hand(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text(TABLE)

    class Answerer:
        def answer(self, image: Image.Image, question: str) -> str:
            return "no" if "Is there a cat" in question else "yes"

    # The cat is missing, so of its four propositions only the mat counts; all three of the dogs do.
    assert summarised("dpg", tmp_path / "table.csv", Answerer(), 2) == pytest.approx(
        {"dpg_overall": 62.5, "dpg_attribute": 50.0, "dpg_entity": 200 / 3, "dpg_relation": 50.0}
    )


def test_corebench_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [["yes", "no"], ["yes", "yes"], ["no", "no"], ["no", "maybe"], ["yes", "Yes."], ["no", "yes"]]
    monkeypatch.setattr(
        "rmoe_megatron.evaluation.corebench.judging.ask",
        lambda models, image, prompt, wording, is_made_here: said[number_of(image)],
    )
    found = summarised("corebench", save_tables(tmp_path / "data"), None, 6)
    parts = {"C-MI": 50.0, "C-MA": 100.0, "C-MR": 0.0, "C-TR": 0.0, "R-LR": 100.0, "R-BR": 50.0}
    assert found == pytest.approx(
        {"corebench_overall": 50.0, "corebench_composition": 37.5, "corebench_reasoning": 75.0}
        | {f"corebench_{name}": score for name, score in parts.items()}
    )


def test_pickscore_by_hand(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog  \n")

    class Scorer:
        def score(self, image: Image.Image, prompt: str) -> float:
            return {"a cat": 20.0, "a dog": 21.0}[prompt] + number_of(image)

    assert summarised("pickscore", tmp_path / "prompts.txt", Scorer(), 2) == {"pickscore": 21.0}


def test_mazes_by_hand(tmp_path: Path) -> None:
    """Two of eight pictures are the answers of their grids; the others are those of other grids."""
    build_mazes(tmp_path / "mazes", REGION, {"train": 1, "val": 0, "test": 8}, seed=2)
    benchmark = open_benchmark(EvaluationConfig("mazes", limit=8, data=str(tmp_path / "mazes")))
    samples = ShardDataset(tmp_path / "mazes" / "test")
    answers = [samples[number]["png"].transpose(1, 2, 0) for number in range(8)]
    drawn = np.stack([*answers[:2], *answers[3:], answers[2]])
    verdicts = [benchmark.judge(None, number, picture) for number, picture in enumerate(drawn)]
    assert benchmark.summarise(verdicts, drawn).metrics["mazes_exact"] == 0.25


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluations")
    config = make_run(folder, side=SIDE)
    judges = {name: folder / name for name in ("detector", "clip", "answerer")}
    for save, path in zip((save_detector, save_clip, save_answerer), judges.values(), strict=True):
        save(path)
    (folder / "prompts.txt").write_text("a cat\na dog\na cow\n")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(each) + "\n" for each in METADATA))
    (folder / "data.jsonl").write_text(json.dumps(CAT) + "\n")
    asked = [
        {"name": "shapes", "every": 2, "limit": 7},
        {"name": "geneval", "data": "metadata.jsonl", "judges": ["detector", "clip"]},
        {"name": "geneval2", "data": "data.jsonl", "judges": ["answerer"]},
        {"name": "pickscore", "data": "prompts.txt", "judges": ["clip", "clip"]},
    ]
    for each in asked:
        each |= {"data": str(folder / str(each["data"]))} if "data" in each else {}
        each |= {"judges": [str(judges[name]) for name in each.get("judges", [])]}  # type: ignore[attr-defined]
    text = config.read_text().replace("sample_size: 8, patch_size: 2", f"sample_size: {SIDE}, patch_size: 8")
    text = text.replace("sample_prompts: [a red circle]", f"evaluations: {json.dumps(asked)}")
    config.write_text(
        text.replace("steps: 20,", "steps: 4,").replace("validate_every: 10", "validate_every: 100")
    )
    for name, ranks in (("one", 1), ("two", 2)):
        code, errors = rmoe("train", str(config), f"run_dir={folder}/{name}", ranks=ranks)
        assert code == 0, errors
    return folder


@pytest.mark.distributed
def test_ranks_that_share_a_model_share_the_judging(run: Path) -> None:
    (config,) = run.glob("*.yaml")
    layout = "parallel={tensor_model_parallel_size: 2, sequence_parallel: true}"
    shared = [layout, f"run_dir={run}/shared"]
    code, errors = rmoe("train", str(config), *shared, ranks=2)
    assert code == 0, errors
    for name in ("shapes_seen", "geneval_overall", "geneval2_soft_tifa_gm", "pickscore"):
        expected = losses(run / "one", name)
        assert losses(run / "shared", name) == pytest.approx(expected, rel=0.05), name


def test_judging_stops_between_two_pictures_and_gives_the_gpu_back() -> None:
    class Judge:
        places: list[str] = []  # noqa: RUF012

        def to(self, device: torch.device) -> "Judge":
            self.places.append(device.type)
            return self

    judged: list[int] = []
    benchmark = Benchmark(
        ["a"] * 4, lambda models, number, image: judged.append(number), lambda *found: None, Judge
    )  # type: ignore[arg-type, return-value, func-returns-value]
    calls = iter([None, None, RuntimeError("stop")])

    def check() -> None:
        if (error := next(calls)) is not None:
            raise error

    config = tiny_config()
    with one_rank(config):
        evaluation = Evaluation(config, benchmark, None, None)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="stop"):
            evaluation._judged(np.zeros((4, 2, 2, 3), dtype=np.uint8), check)
    assert judged == [0, 1]
    assert len(Judge.places) == 3  # to the host, to the device, and back
    assert Judge.places[-1] == "cpu"


def test_a_run_logs_and_draws_it_and_two_ranks_do_the_same(run: Path) -> None:
    for name in ("shapes_seen", "shapes_heldout", "shapes_seen_counting"):
        found = losses(run / "one", name)
        assert list(found) == [2, 4]
        assert losses(run / "two", name) == found
    for name in ("geneval_overall", "geneval2_soft_tifa_gm", "pickscore"):
        found = losses(run / "one", name)
        assert list(found) == [4]  # after the last step
        # Their pictures differ by a level or two of 255.
        assert losses(run / "two", name)[4] == pytest.approx(found[4], rel=0.05)
    pictures = []
    for name in ("one", "two"):
        for benchmark in ("geneval", "geneval2", "pickscore"):
            assert (run / name / "evaluations" / benchmark / "step-00000004.png").is_file()
        folder = run / name / "evaluations" / "shapes"
        assert [path.name for path in sorted(folder.iterdir())] == ["step-00000002.png", "step-00000004.png"]
        pictures.append(np.asarray(Image.open(folder / "step-00000004.png"), dtype=int))
    assert pictures[0].shape == pictures[1].shape
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def test_an_evaluation_that_a_checkpoint_left_to_be_done_is_made_up_for(run: Path) -> None:
    found = losses(run / "one", "shapes_seen")
    shutil.rmtree(run / "one" / "evaluations")
    forget_pending(run / "one")  # as if it had ended before it put down that they were made
    code, errors = rmoe("train", "--resume", str(run / "one"))
    assert code == 0, errors
    assert losses(run / "one", "shapes_seen") == found
    assert (run / "one" / "evaluations" / "shapes" / "step-00000004.png").is_file()


@pytest.mark.parametrize(
    ("evaluations", "words"),
    [
        ("{name: imagenet}", "between steps by shapes, mazes, geneval, geneval2, dpg, corebench, pickscore"),
        ("{name: shapes}, {name: shapes}", "as that of an earlier one"),
        ("{name: shapes, limit: 2}", "limit"),
        ("{name: shapes, often: 2}", "often"),
        ("{name: shapes, data: x}", "the scenes of shapes come from no file"),
        ("{name: shapes}", "whose pictures are of 32 x 32 pixels, but the model makes 8 x 8"),
        ("{name: geneval2}", "training.evaluations[0].data is null; geneval2 needs the table"),
        ("{name: geneval, judges: [one]}", "has 1 models, but geneval has 2 judges"),
        ("{name: dpg, data: x, judges: [mplug]}", "name a Qwen3-VL"),
        ("{name: geneval, judges: [nowhere, nowhere]}", "There is no folder nowhere (training.evaluations[0].judges)"),
        ("{name: geneval}", "hf download facebook/mask2former-swin-small-coco-instance"),
        ("{name: corebench, data: nowhere}", "nowhere/C-MI.json; give the folder data of"),
        ("{name: mazes, data: nowhere}", "nowhere/dataset.json"),
        ("{name: pickscore, data: nowhere}", "nowhere"),
    ],
)  # fmt: skip
def test_what_a_run_cannot_be_scored_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluations: str, words: str
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    config = make_run(tmp_path)
    code, errors = rmoe("train", str(config), "--check", f"training.evaluations=[{evaluations}]")
    assert code == 2
    assert words in errors
    assert "Traceback" not in errors


def test_a_missing_judge_is_said_before_training(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    code, errors = rmoe(
        "train", str(config), "training.evaluations=[{name: geneval, judges: [nowhere, nowhere]}]"
    )
    assert code == 2
    assert "There is no folder nowhere (training.evaluations[0].judges)" in errors
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
