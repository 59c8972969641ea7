"""The page of an export: base and licence, data, scores and pictures up to its step, and Python that runs."""

import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from rmoe_megatron.checkpoint.folders import find_checkpoint, read_state
from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.run import ParallelConfig
from rmoe_megatron.conversion.export import export_run
from rmoe_megatron.conversion.origin import read_origin
from tests.support.diffusers_models import TEXT_LENGTH, save_model
from tests.support.runs import save_untrained
from tests.training.test_dit_training import CONFIG

PAGE = """---
license: other
license_name: {name}
license_link: LICENSE.md
tags: [text-to-image]
---
# A model
"""


def front(page: str) -> dict[str, str]:
    """What the hub reads of a page."""
    values: dict[str, str] = yaml.safe_load(page.split("---\n")[1])
    return values


def test_scores_and_pictures_are_those_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG.format(folder=tmp_path))
    config = load_config(
        tmp_path / "config.yaml", ["training.sample_prompts=['2','0']", "training.sample_steps=2"]
    )
    run = Path(config.run_dir)
    save_untrained(config, run, step=4)
    records = [{"step": step, "loss": 1.0, "validation_loss": 0.1 * step} for step in (2, 4, 6)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "samples").mkdir()
    for step, grey in ((2, 20), (4, 40), (6, 60)):
        Image.new("L", (8, 8), grey).save(run / "samples" / f"step-{step:08d}.png")
    export_run(run, tmp_path / "out")
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| validation_loss | 0.4 | 4 |" in page
    assert "| validation_loss | 0.6" not in page
    assert "*Step 4: 2; 0. Not picked.*" in page
    assert Image.open(tmp_path / "out" / "samples.png").getpixel((0, 0)) == 40
    assert "| data | `data/train` |" in page
    assert str(tmp_path) not in page
    (run / "metrics.jsonl").write_text('{"loss": 1}\n')
    export_run(run, tmp_path / "without")  # an export does not fail for what its page cannot say
    assert "validation_loss" not in (tmp_path / "without" / "README.md").read_text()
    export_run(run, tmp_path / "raw", averaged=False)
    assert (
        "validation_loss" not in (tmp_path / "raw" / "README.md").read_text()
    )  # which averages were scored by
    monkeypatch.chdir(tmp_path / "out")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    assert Image.open("picture.png").size == (8, 8)


def test_base_and_licence_of_a_repository(tmp_path: Path) -> None:
    """As the hub's page of the base says them, through an import, for the hub's page of the export."""
    from rmoe_megatron.conversion.importing import import_diffusers

    save_model("sd3.5-medium", tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(PAGE.format(name="a-community-licence"))
    import_diffusers(tmp_path / "base", tmp_path / "run", TEXT_LENGTH, ParallelConfig())
    state = read_state(find_checkpoint(tmp_path / "run", None).path)
    licence = {"license": "other", "license_name": "a-community-licence", "license_link": "LICENSE.md"}
    assert (state["source"], state["is_repository"], state["licence"]) == ("base", False, licence)
    assert read_origin(tmp_path / "base", "owner/name") == {
        "source": "owner/name", "is_repository": True, "licence": licence,
    }  # fmt: skip
    (tmp_path / "base" / "README.md").write_text(PAGE.format(name="'x | <b>y</b>'"))
    assert read_origin(tmp_path / "base", "owner/name") == {"source": "owner/name", "is_repository": True}
    (tmp_path / "base" / "README.md").write_text("---\n: {\n---\n")
    assert read_origin(tmp_path / "base", None) == {"source": "base", "is_repository": False}
