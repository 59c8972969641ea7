"""From the command line: mazes are built, a looped model is trained on them, exported, sampled and scored at several depths."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.commands import rmoe
from tests.support.runs import losses

TINY = [
    "model.sample_size=16", "model.text_length=17", "model.pos_embed_max_size=4", "model.hidden_size=16",
    "training.steps=4", "training.micro_batch_size=4", "training.global_batch_size=8", "optimizer.warmup_steps=1",
    "training.log_every=1", "training.validate_every=4", "training.validation_samples=8",
]  # fmt: skip


def test_a_looped_model_from_data_to_scores(tmp_path: Path) -> None:
    mazes, run, model, scores = (str(tmp_path / name) for name in ("mazes", "run", "model", "scores"))
    data = [
        f"encoders.text_encoder={mazes}/encoder",
        f"data.train={mazes}/train",
        f"data.validation={mazes}/val",
    ]
    dense = ["loop=null", "diffusion.depth_loss=last", f"run_dir={tmp_path}/dense"]
    sides = [
        "--canvas",
        "4",
        "--train-sides",
        "3,4",
        "--train-steps",
        "4",
        "--test-sides",
        "4",
        "--test-steps",
        "3,6",
    ]
    counts = ["--train", "32", "--val", "8", "--test", "6"]
    commands = [
        ["data", "build-mazes", mazes, *sides, *counts],
        ["train", "configs/mazes_quick.yaml", f"run_dir={run}", *data, *TINY],
        ["convert", "to-hf", run, model],
        ["eval", "mazes", model, "--data", mazes, "--out", scores, "--steps", "1,2", "--depths", "1,4,6"],
        ["sample", model, "--prompt", "A../.#./...", "--steps", "1", "--out", f"{tmp_path}/four"],
        ["sample", model, "--prompt", "A../.#./...", "--steps", "1", "--depth", "4", "--out", f"{tmp_path}/same"],
        ["sample", model, "--prompt", "A../.#./...", "--steps", "1", "--depth", "9", "--out", f"{tmp_path}/nine"],
        ["train", "configs/mazes_quick.yaml", *data, *TINY, *dense],
        ["convert", "to-hf", f"{tmp_path}/dense", f"{tmp_path}/dense_model", "--transformer", "rmoe"],
    ]  # fmt: skip
    for command in commands:
        code, errors = rmoe(*command)
        assert code == 0, errors
    assert len(set(losses(tmp_path / "run").values())) == 4
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    asked = [(row["sampling_steps"], row["depth"]) for row in results["rows"]]
    assert asked == [(steps, depth) for steps in (1, 2) for depth in (1, 4, 6)]
    assert all(len(row["right"]) == 6 for row in results["rows"])
    four, same, nine = (
        np.asarray(Image.open(tmp_path / name / "00000.png")) for name in ("four", "same", "nine")
    )
    assert four.shape == (16, 16, 3)
    assert np.array_equal(four, same)
    assert not np.array_equal(four, nine)
    code, errors = rmoe(
        "eval",
        "mazes",
        f"{tmp_path}/dense_model",
        "--data",
        mazes,
        "--out",
        f"{tmp_path}/no",
        "--depths",
        "2",
    )
    assert code == 2
    assert "no depth to set" in errors
