"""Small inputs of every command, in which nothing is wrong: a trained run, an imported one, a model, and raw data."""

import io
import shutil
from pathlib import Path

from PIL import Image

from tests.conversion.test_import_export import import_model
from tests.hf.test_pipelines import recurrent_sd3
from tests.support.commands import rmoe
from tests.support.diffusers_models import save_model
from tests.support.runs import make_run, write_shard


def make_inputs(root: Path) -> None:
    """Write ``config.yaml`` with its data, ``run``, ``dit``, ``imported``, ``model``, ``pictures``, ``table`` and ``raw``."""
    code, errors = rmoe(
        "train", str(make_run(root)), "training.steps=2", "checkpoint.every=2", "training.sample_prompts=[]",
        "data.validation=null", "optimizer.warmup_steps=0",
    )  # fmt: skip
    assert code == 0, errors
    save_model("dit", root / "dit")
    import_model(root / "dit", root / "imported")
    recurrent_sd3(root / "model")
    (root / "pictures").mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, format="png")
    for name in ("a", "b"):
        (root / "pictures" / f"{name}.png").write_bytes(picture.getvalue())
        (root / "pictures" / f"{name}.txt").write_text("a cat")
    (root / "table").mkdir()
    (root / "table" / "table.jsonl").write_text('{"image": "a.png", "caption": "a cat"}\n')
    shutil.copy(root / "pictures" / "a.png", root / "table")
    sample = {"png": picture.getvalue(), "txt": b"a cat"}
    for number in range(2):
        write_shard(root / "raw" / f"{number}.tar", [sample, sample])
