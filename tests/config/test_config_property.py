"""Whatever is asked for in a configuration is accepted or refused with one sentence."""

import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rmoe_megatron.config.loading import _all_keys, load_config
from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.errors import UserError
from rmoe_megatron.training.preflight import check
from tests.support.runs import CONFIG, make_run

KEYS = [
    "seed", "run_dir", "precision", "device", "model", "model.preset", "model.architecture", "model.num_layers", "lora",
    "model.hidden_size", "model.patch_size", "model.dual_attention_layers", "model.mlp_norm_eps", "recurrence.layers",
    "recurrence.rank", "recurrence.tau", "recurrence.gate_inputs", "recurrence", "lora.layers", "fine_tuning.base",
    "fine_tuning", "diffusion.shift", "diffusion.shift_base_size", "diffusion.mode_scale", "diffusion.objective",
    "encoders.dropped", "encoders.text_encoder", "data.train", "data.validation", "data.shuffle", "data.num_workers",
    "optimizer.learning_rate", "optimizer.ema_power", "training.steps", "training.global_batch_size", "training",
    "training.sample_prompts", "parallel.tensor_model_parallel_size", "parallel.bucket_size", "logging.wandb",
    "parallel.virtual_pipeline_model_parallel_size", "logging.wandb.mode", "checkpoint.every", "logging", "nothing.here",
]  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-2, 40), st.sampled_from([10**9, 2**63, -(2**64), 10**400]), st.floats(), st.floats(0, 2)
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "null", ".nan", "1e400", "${oc.env:HOME}", "__builtins__", "dit", "sd3_medium", "/dev/null", "~"]),
)  # fmt: skip
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS, st.binary(max_size=4), st.dates()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(TEXTS, st.integers(), st.none()), inner, max_size=3),
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("property")
    make_run(folder)
    return folder


def load_and_validate(path: Path, overrides: list[str], ranks: int) -> None:
    try:
        check(load_config(path, overrides), ranks)
    except UserError as error:
        message = str(error)
        assert message.endswith((".", "?")), message
        assert "\n" not in message
        assert len(message) < 2000


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    overrides=st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3),
    ranks=st.integers(1, 5),
)
def test_overrides_are_accepted_or_refused(
    folder: Path, overrides: list[tuple[str, object]], ranks: int
) -> None:
    written = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in overrides]
    load_and_validate(folder / "config.yaml", written, ranks)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_files_are_accepted_or_refused(folder: Path, data: st.DataObject) -> None:
    content = CONFIG.format(folder=folder).encode()
    start = data.draw(st.integers(0, len(content)))
    length = data.draw(st.integers(0, 12))
    junk = data.draw(st.one_of(st.binary(max_size=8), st.sampled_from([b"[", b"{", b": ", b"*a", b"!!python/name:os.system ", b"\xff"])))  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "config.yaml"
        path.write_bytes(content[:start] + junk + content[start + length :])
        load_and_validate(path, [], 1)


def test_the_keys_above_are_those_of_the_schema() -> None:
    from omegaconf import OmegaConf

    known = _all_keys(OmegaConf.structured(RunConfig))
    assert len([key for key in KEYS if key in known]) > 20
