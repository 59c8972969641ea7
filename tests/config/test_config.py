"""Loading and validation of configurations: what is refused, and the sentence that says so."""

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest

from rmoe_megatron.config.bounds import bounds_of
from rmoe_megatron.config.loading import load_config, save_config
from rmoe_megatron.config.run import Precision, RunConfig
from rmoe_megatron.errors import UserError
from rmoe_megatron.model.parameters import dense_parameters, expert_parameters
from rmoe_megatron.training.preflight import check
from tests.support.runs import make_run

TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def test_overrides_and_round_trip(path: Path, tmp_path: Path) -> None:
    overrides = [
        "recurrence.layers=[0]",
        "precision=bf16",
        "optimizer.learning_rate=2e-4",
        "logging.wandb.project=x",
    ]
    config = load_config(path, overrides)
    assert config.recurrence is not None
    assert config.recurrence.layers == [0]
    assert config.recurrence.rank == 4
    assert config.precision is Precision.bf16
    assert config.optimizer.learning_rate == 2e-4
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml", []) == config


def test_recurrence_can_be_switched_off_and_on(path: Path) -> None:
    assert load_config(path, ["recurrence=null"]).recurrence is None
    again = load_config(path, ["recurrence=null", "recurrence.layers=[1]"]).recurrence
    assert again is not None
    assert again.layers == [1]
    assert again.num_modules == 5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("recurence=null", ["recurence", "did you mean recurrence?"]),
        ("model.hiden_size=3", ["model.hiden_size", "did you mean model.hidden_size?"]),
        ("hidden_size=3", ["did you mean model.hidden_size?"]),
        ("model.hidden_size=wide", ["model.hidden_size", "wide"]),
        ("precision=fp7", ["precision", "fp7", "bf16"]),
        ("training", ["key=value"]),
        ("recurrence.layers=[x]", ["recurrence.layers"]),
        ("run_dir=${nope}", ["run_dir", "nope"]),
        ("training.sample_prompts=['${oc.env:HOME}']", ["sample_prompts", "not resolved"]),
        ("model.preset=[a]", ["model.preset", "presets are"]),
        ("model.hidden_size=" + "1" * 5000, ["model.hidden_size", "not valid YAML"]),
        ("model={hidden_size: 3, hidden_size: 4}", ["'hidden_size' stands twice"]),
        ("model={1: 2}", ["Unknown key model.1"]),
        ("recurrence.layers=" + "[" * 3000, ["recurrence.layers"]),
    ],
)
def test_wrong_overrides(path: Path, override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config(path, [override])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_missing_values_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run_dir: x\ndata: {train: y}\n")
    with pytest.raises(UserError, match=r"model.hidden_size.*optimizer.learning_rate.*training.steps"):
        load_config(tmp_path / "config.yaml", [])


# The ranks that a configuration's first lines name, and its parameters in billions; toys have one rank.
HARDWARE = {
    "sd3_medium_recurrent": (8, 2.05), "dit_xl2_recurrent": (8, 0.68), "imagenet_dit_xl_2": (16, 0.70),
    "t2i_2b": (32, 2.06), "t2i_8b_moe": (128, 8.17),
    # SD3.5-medium's 2.47 without 0.23 of fixed positions; LoRA adds 24 x 6 x 32 x 1536 numbers.
    "sd35_medium_full": (1, 2.24), "sd35_medium_lora": (1, 2.25), "sd35_medium_recurrent": (1, 2.26),
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid_but_for_their_data(path: Path, tmp_path: Path) -> None:
    """Everything up to the folders, which a fresh clone does not have."""
    ranks, billions = HARDWARE.get(path.stem, (1, None))
    brought = ["model.preset=sd3.5_medium"] if path.stem.startswith("sd35_medium_") else []  # by the base
    config = load_config(path, [f"run_dir={tmp_path}", *brought])
    missing = "fine_tuning.base" if config.fine_tuning else "shard folder"
    with pytest.raises(UserError, match=missing):
        check(config, ranks)
    if billions is None:
        assert path.stem.startswith(("shapes_", "mazes_"))
    else:
        parameters = dense_parameters(config) + expert_parameters(config)
        assert parameters / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_preset_fills_the_model_and_other_keys_override_it(path: Path, tmp_path: Path) -> None:
    (tmp_path / "preset.yaml").write_text(
        "run_dir: x\nmodel: {preset: sd3.5_medium, sample_size: 64}\ndata: {train: y}\n"
        "optimizer: {learning_rate: 1}\ntraining: {steps: 1, micro_batch_size: 1, global_batch_size: 1}\n"
    )
    model = load_config(tmp_path / "preset.yaml", ["model.num_layers=30"]).model
    assert (model.hidden_size, model.num_layers, model.sample_size) == (1536, 30, 64)
    assert model.dual_attention_layers == list(range(13))
    assert model.qk_norm
    other = load_config(tmp_path / "preset.yaml", ["model.preset=sd3_medium"]).model
    assert other.dual_attention_layers == []
    assert not other.qk_norm
    save_config(load_config(tmp_path / "preset.yaml", []), tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml", []) == load_config(tmp_path / "preset.yaml", [])
    with pytest.raises(UserError, match="did you mean sd3_medium?"):
        load_config(tmp_path / "preset.yaml", ["model.preset=sd3_mediun"])


@pytest.mark.parametrize(
    "content",
    ["a: [", "- 1", "\x00", "seed: 1\nseed: 2", "a: &a [1]\nb: *a", "? [1, 2]\n: 3", "a: 2020-99-99"],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match="config.yaml"):
        load_config(tmp_path / "config.yaml", [])


@pytest.mark.parametrize(
    ("overrides", "world_size", "words"),
    [
        (["model.patch_size=3"], 1, ["model.sample_size (8)", "model.patch_size (3)"]),
        (["model.num_attention_heads=5"], 1, ["model.hidden_size (32)", "num_attention_heads (5)"]),
        (["training.steps=0"], 1, ["training.steps", "at least 1"]),
        (["optimizer.learning_rate=-1"], 1, ["optimizer.learning_rate"]),
        (["diffusion.guidance_dropout=1.5"], 1, ["guidance_dropout", "at least 0 and at most 1"]),
        (["optimizer.warmup_steps=20"], 1, ["warmup_steps (20)", "training.steps (20)"]),
        (["recurrence.layers=[3]"], 1, ["block 3", "0 to 2"]),
        (["recurrence.layers=[1,1]"], 1, ["twice"]),
        (["recurrence.rank=0"], 1, ["recurrence.rank"]),
        (["recurrence.tau=0"], 1, ["recurrence.tau"]),
        (["recurrence.gate_inputs=[colour]"], 1, ["gate_inputs", "tokens"]),
        (["training.global_batch_size=6"], 1, ["global_batch_size (6)", "4 x 1"]),
        ([], 3, ["global_batch_size (8)", "4 x 3"]),
        (["parallel.tensor_model_parallel_size=2"], 3, ["number of ranks (3)", "2 x 1"]),
        (["parallel.expert_model_parallel_size=3"], 3, ["num_modules (4)", "expert_model_parallel_size (3)"]),
        (["parallel.expert_model_parallel_size=2"], 1, ["expert_model_parallel_size (2)", "(1)"]),
        (["recurrence=null", "parallel.expert_model_parallel_size=2"], 2, ["no experts"]),
        (["parallel.pipeline_model_parallel_size=2"], 2, ["num_layers (3)", "(2)"]),
        (
            [*TP2, "parallel.expert_model_parallel_size=4"],
            2,
            ["ranks of a pipeline stage (2)", "expert_model_parallel_size (4)"],
        ),
        (["parallel.tensor_model_parallel_size=2"], 2, ["sequence_parallel=true"]),
        (["parallel.context_parallel_size=3"], 3, ["patches of an image (16)", "1 x 3"]),
        (["parallel.context_parallel_size=0"], 1, ["context_parallel_size", "at least 1"]),
        (
            ["parallel.virtual_pipeline_model_parallel_size=3"],
            1,
            ["pipeline_model_parallel_size greater than 1"],
        ),
        (["parallel.overlap_param_gather=true"], 1, ["overlap_grad_reduce=true"]),
        (["parallel.bucket_size=9"], 1, ["bucket_size is 9", "overlap_grad_reduce"]),
        (
            [
                "model.num_layers=4",
                "fine_tuning.base=/tmp",
                "recurrence.layers=[0,1]",
                "parallel.pipeline_model_parallel_size=2",
            ],
            2,
            ["Blocks 2 to 3", "none of them is trained"],
        ),
        (
            [
                "model.num_layers=4",
                "parallel.pipeline_model_parallel_size=2",
                "parallel.virtual_pipeline_model_parallel_size=2",
                "training.micro_batch_size=8",
            ],
            2,
            ["micro-batches per step", "(1)"],
        ),
        (["model.hidden_size=34"], 1, ["must be even", "17"]),
        (["optimizer.beta2=1"], 1, ["optimizer.beta2", "less than 1"]),
        (["optimizer.weight_decay=.inf"], 1, ["weight_decay", "inf"]),
        (["diffusion.logit_mean=.nan"], 1, ["logit_mean", "nan"]),
        (["recurrence.tau=.inf"], 1, ["tau"]),
        (["training.sample_guidance=.nan"], 1, ["sample_guidance"]),
        (["run_dir=''"], 1, ["run_dir is empty"]),
        (['run_dir="a\\0b"'], 1, ["run_dir", "control character"]),
        (["encoders.dropped=[t5]"], 1, ["dropped", "minilm"]),
        (["recurrence.rank=33"], 1, ["recurrence.rank (33)", "hidden_size (32)"]),
        (["data.num_workers=100000"], 1, ["num_workers", "at most 256"]),
        (["model.num_layers=1000000000"], 1, ["num_layers", "at most 1024"]),
        ([f"seed={2**64}"], 1, ["seed", "32 bits"]),
        (["logging.wandb={projekt: x}"], 1, ["projekt", "did you mean project?"]),
        (["logging.wandb={mode: maybe}"], 1, ["mode", "maybe", "offline"]),
        (["logging.wandb={id: x}"], 1, ["logging.wandb.id", "run itself"]),
        (["logging.wandb={config: x.yaml}"], 1, ["logging.wandb.config", "run itself"]),
        (["optimizer.learning_rate=.inf"], 1, ["optimizer.learning_rate", "at most 1000", "inf"]),
        (["run_dir=/proc/run"], 1, ["run_dir", "/proc", "cannot be written"]),
        (["parallel.sequence_parallel=true"], 1, ["sequence_parallel"]),
        (["data.train=/nowhere"], 1, ["/nowhere", "shard folder"]),
        (["device=cuda"], 1, ["cuda", "no GPU"]),
        (["model.text_length=0"], 1, ["model.text_length", "MM-DiT"]),
        (["model.num_classes=3"], 1, ["model.num_classes is 3", "architecture=dit"]),
        (["model.downscale_freq_shift=0"], 1, ["model.downscale_freq_shift is 0", "leave it out"]),
        (["model.mlp_norm_eps=1e-5"], 1, ["model.mlp_norm_eps is 1e-05", "leave it out"]),
        (
            ["model.architecture=dit", "model.num_classes=3", "model.downscale_freq_shift=0.5"],
            1,
            ["model.downscale_freq_shift must be 1", "0.5"],
        ),
        (["model.architecture=dit"], 1, ["model.num_classes", "DiT"]),
        (["model.architecture=dit", "model.num_classes=3"], 1, ["model.text_length is 6", "DiT"]),
        (["model.dual_attention_layers=[5]"], 1, ["dual_attention_layers", "block 5", "0 to 2"]),
        (["model.learned_sigma=true"], 1, ["learned_sigma"]),
        (["diffusion.objective=ddpm", "diffusion.prediction=sample"], 1, ["prediction=sample", "DDPM"]),
        (["diffusion.min_snr_gamma=5"], 1, ["min_snr_gamma", "ddpm"]),
        (["diffusion.mode_scale=2"], 1, ["mode_scale", "1.75"]),
        (["diffusion.shift_base_size=0"], 1, ["shift_base_size"]),
        (["encoders.dropped=[t6]"], 1, ["t6", "clip_l, clip_g, t5"]),
        (["lora.layers=[1]", "lora.rank=4"], 1, ["lora and recurrence"]),
        (["recurrence=null", "lora.layers=[9]", "lora.rank=4"], 1, ["lora.layers", "block 9"]),
        (["recurrence=null", "lora.layers=[1]", "lora.rank=33"], 1, ["lora.rank (33)", "hidden_size (32)"]),
        (["fine_tuning.base=/nowhere"], 1, ["/nowhere", "from-hf"]),
        (["fine_tuning.base=/tmp", "recurrence=null"], 1, ["trainable=added", "both are null"]),
        (["fine_tuning.base=/tmp", "fine_tuning.blocks=[1]"], 1, ["fine_tuning.blocks", "added"]),
        (["fine_tuning.base=/tmp", "fine_tuning.trainable=blocks"], 1, ["fine_tuning.blocks is empty"]),
        (["optimizer.ema_power=-1"], 1, ["ema_power"]),
    ],
)
def test_validation(
    path: Path, overrides: list[str], world_size: int, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError) as error:
        check(load_config(path, overrides), world_size)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_valid_layouts_pass(path: Path) -> None:
    check(load_config(path, []), 1)
    check(load_config(path, ["parallel.expert_model_parallel_size=2"]), 2)
    check(load_config(path, [*TP2, "parallel.expert_model_parallel_size=2"]), 2)


def test_run_dir_below_a_file_is_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check(load_config(path, [f"run_dir={tmp_path}/file/run"]), 1)


def test_every_number_has_bounds() -> None:
    """What has none would be accepted whatever it is."""

    def numbers(section: type, prefix: str = "") -> list[str]:
        found = []
        for each, hint in zip(fields(section), get_type_hints(section).values(), strict=True):
            kinds = set(get_args(hint)) or {hint}
            for kind in kinds:
                if is_dataclass(kind):
                    found += numbers(kind, f"{each.name}.")
            if (
                kinds & {int, float}
                and get_origin(hint) is not list
                and bounds_of(section, each.name) is None
            ):
                found.append(prefix + each.name)
        return found

    assert numbers(RunConfig) == []
