"""Benchmarks between steps: a perfect model scores one, ranks share the work, a run logs and draws it, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rmoe_megatron.config.run import EvaluationConfig, TrainingConfig
from rmoe_megatron.data.batch import Conditions, Prompts, TextConditions
from rmoe_megatron.data.shapes.render import render
from rmoe_megatron.encoders.autoencoder import encode_images, load_autoencoder
from rmoe_megatron.training.evaluations import ShapesEvaluation, captions_of, shapes_scenes
from tests.support.commands import rmoe
from tests.support.configurations import one_rank, tiny_config
from tests.support.runs import losses, make_run

SIDE = 32


@pytest.mark.parametrize("wrong", [0, 3])
def test_a_model_that_draws_the_scenes_scores_one(wrong: int) -> None:
    """Its velocity leads from any noise to the scene of the caption, which it knows by its number; some captions it mistakes."""
    training = TrainingConfig(
        steps=1, micro_batch_size=1, global_batch_size=1, sample_steps=4, sample_guidance=1.0
    )
    config = tiny_config(training=training)
    scenes = shapes_scenes(EvaluationConfig("shapes", limit=35))
    autoencoder = load_autoencoder("pixel", torch.device("cpu"))
    drawn = np.stack([render(scene.objects) for _, scene in scenes])
    blank = np.full_like(drawn[:1], 40)
    pixels = torch.from_numpy(np.concatenate((drawn, blank))).permute(0, 3, 1, 2)
    targets = encode_images(autoencoder, pixels)
    number = torch.arange(len(scenes)).float().view(-1, 1)
    null = TextConditions(torch.zeros(1, 1, 1), torch.full((1, 1), -1.0))
    prompts = Prompts(captions_of(scenes), TextConditions(torch.zeros(len(scenes), 1, 1), number), null)

    def denoise(latents: Tensor, timestep: Tensor, keys: Tensor, conditions: Conditions) -> Tensor:
        assert isinstance(conditions, TextConditions)
        asked = conditions.text_pooled[:, 0].long()
        asked = torch.where((asked >= 0) & (asked < wrong), torch.tensor(-1), asked)
        return (latents - targets[asked]) / (timestep / 1000).view(-1, 1, 1, 1)

    with one_rank(config):
        evaluated = ShapesEvaluation(config, scenes, prompts, autoencoder).run(denoise, SIDE, SIDE)
    assert evaluated is not None
    # Six skills in turn: of 35 scenes the first ones are of skills with six scenes each, but the last skill has five.
    expected = 1 - wrong / 6 / 6
    assert evaluated.metrics["shapes_seen"] == pytest.approx(expected)
    assert evaluated.metrics["shapes_heldout"] == 1
    assert evaluated.picture.width > 300


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluations")
    config = make_run(folder, side=SIDE)
    text = config.read_text().replace("sample_size: 8, patch_size: 2", f"sample_size: {SIDE}, patch_size: 8")
    text = text.replace("sample_prompts: [a red circle]", "evaluations: [{name: shapes, every: 2, limit: 7}]")
    config.write_text(
        text.replace("steps: 20,", "steps: 4,").replace("validate_every: 10", "validate_every: 100")
    )
    for name, ranks in (("one", 1), ("two", 2)):
        code, errors = rmoe("train", str(config), f"run_dir={folder}/{name}", ranks=ranks)
        assert code == 0, errors
    return folder


def test_a_run_logs_and_draws_it_and_two_ranks_do_the_same(run: Path) -> None:
    for name in ("shapes_seen", "shapes_heldout", "shapes_seen_counting"):
        found = losses(run / "one", name)
        assert list(found) == [2, 4]
        assert losses(run / "two", name) == found
    pictures = []
    for name in ("one", "two"):
        folder = run / name / "evaluations" / "shapes"
        assert [path.name for path in sorted(folder.iterdir())] == ["step-00000002.png", "step-00000004.png"]
        pictures.append(np.asarray(Image.open(folder / "step-00000004.png"), dtype=int))
    assert pictures[0].shape == pictures[1].shape
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.evaluations=[{name: geneval}]"], "shapes is what a run can be scored by"),
        (["training.evaluations=[{name: shapes}, {name: shapes}]"], "as that of an earlier one"),
        (["training.evaluations=[{name: shapes, limit: 2}]"], "limit"),
        (["training.evaluations=[{name: shapes, often: 2}]"], "often"),
        ([], "whose pictures are of 32 x 32 pixels, but the model makes 8 x 8"),
    ],
)
def test_what_a_run_cannot_be_scored_by(tmp_path: Path, overrides: list[str], words: str) -> None:
    config = make_run(tmp_path)
    asked = overrides or ["training.evaluations=[{name: shapes}]"]
    code, errors = rmoe("train", str(config), "--check", *asked)
    assert code == 2
    assert words in errors
    assert "Traceback" not in errors
