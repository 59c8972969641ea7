"""A run that starts from another one has its model, in all that it does not say itself."""

from pathlib import Path

import pytest

from rmoe_megatron.config.loading import load_config, save_config, to_yaml
from rmoe_megatron.config.model import Prediction
from rmoe_megatron.errors import UserError
from rmoe_megatron.training.base_checks import check_fits
from tests.support.configurations import RECURRENCE, tiny_config

REST = "run_dir: elsewhere\noptimizer: {learning_rate: 1.0e-3}\ntraining: {steps: 3, micro_batch_size: 1, global_batch_size: 1}\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    config = tiny_config(seed=7)
    config.diffusion.prediction, config.diffusion.shift = Prediction.sample, 3.0
    config.diffusion.guidance_dropout = 0.5
    config.encoders.text_encoder = "owner/encoder"
    (tmp_path / "base").mkdir()
    save_config(config, tmp_path / "base" / "config.yaml")
    return tmp_path / "base"


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(REST + text)
    return path


def test_what_describes_the_model_is_the_bases(tmp_path: Path, base: Path) -> None:
    config = load_config(write(tmp_path, f"fine_tuning: {{base: {base}}}"), [])
    assert config.model == tiny_config().model
    assert config.recurrence == RECURRENCE
    assert (config.diffusion.prediction, config.diffusion.shift) == (Prediction.sample, 3.0)
    assert config.encoders.text_encoder == "owner/encoder"
    # How the base was trained is its own affair.
    assert (config.seed, config.diffusion.guidance_dropout, config.run_dir) == (0, 0.1, "elsewhere")
    check_fits(config, load_config(base / "config.yaml", []))
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again, []) == config


def test_what_a_run_says_itself_goes_first(tmp_path: Path, base: Path) -> None:
    text = (
        "fine_tuning: {base: nowhere}\nmodel: {sample_size: 16}\nrecurrence: null\ndiffusion: {shift: 1.0}\n"
    )
    config = load_config(write(tmp_path, text), [f"fine_tuning.base={base}", "model.text_length=9"])
    assert (config.model.sample_size, config.model.text_length, config.model.num_layers) == (16, 9, 3)
    assert config.recurrence is None
    assert config.diffusion.shift == 1.0
    assert config.fine_tuning is not None
    assert config.fine_tuning.base == str(base)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.num_layers=4", "its model.num_layers is 3, this run asks for 4"),
        ("recurrence.rank=8", "has recurrence.rank=4, this run asks for 8"),
        (
            "diffusion.prediction=velocity",
            "has learned diffusion.prediction=sample, this run asks for velocity",
        ),
    ],
)
def test_a_contradiction_is_named(tmp_path: Path, base: Path, override: str, words: str) -> None:
    config = load_config(write(tmp_path, f"fine_tuning: {{base: {base}}}"), [override])
    with pytest.raises(UserError) as error:
        check_fits(config, load_config(base / "config.yaml", []))
    assert words in str(error.value)


def test_a_base_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"There is no run at fine_tuning.base {tmp_path}/nowhere"):
        load_config(write(tmp_path, f"fine_tuning: {{base: {tmp_path}/nowhere}}"), [])


def test_without_fine_tuning_nothing_is_brought(tmp_path: Path, base: Path) -> None:
    path = write(tmp_path, f"fine_tuning: {{base: {base}}}")
    with pytest.raises(UserError, match="leaves required values open: model"):
        load_config(path, ["fine_tuning=null"])
