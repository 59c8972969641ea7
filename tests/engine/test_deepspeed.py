"""Runs with DeepSpeed's engine: what they refuse, save, resume and hand on."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rmoe_megatron.engine
from rmoe_megatron.checkpoint.folders import list_checkpoints
from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.config.engine_checks import check_engine, engine_table
from rmoe_megatron.config.run import (
    DeepSpeedConfig,
    EngineName,
    ParallelConfig,
    Precision,
    Recompute,
    RunConfig,
)
from rmoe_megatron.engine.deepspeed import library
from rmoe_megatron.engine.deepspeed.library import check_deepspeed
from rmoe_megatron.engine.registry import engine_of
from rmoe_megatron.errors import UserError
from tests.support.commands import rmoe
from tests.support.configurations import tiny_config
from tests.support.runs import losses, make_run

DEEPSPEED = replace(tiny_config(), engine=EngineName.deepspeed)
QUIET = ["training.sample_prompts=[]", "checkpoint.keep_last=4"]


def at_stage(stage: int, **settings: object) -> DeepSpeedConfig:
    return DeepSpeedConfig(zero_stage=stage, **settings)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"parallel": ParallelConfig(tensor_model_parallel_size=2)}, "parallel.tensor_model_parallel_size"),
        ({"parallel": ParallelConfig(context_parallel_size=2)}, "parallel.context_parallel_size"),
        ({"parallel": ParallelConfig(pipeline_model_parallel_size=2)}, "data-parallel ranks alone"),
        ({"parallel": ParallelConfig(overlap_grad_reduce=True)}, "engine_options.overlap_comm"),
        ({"parallel": ParallelConfig(expert_model_parallel_size=2), "deepspeed": at_stage(3)}, "zero_stage=3"),
        ({"precision": Precision.fp8_emulated}, "precision is not for engine=deepspeed"),
        ({"training": replace(DEEPSPEED.training, compile=True)}, "training.compile"),
        (
            {"training": replace(DEEPSPEED.training, recompute=Recompute.selective), "deepspeed": at_stage(2)},
            "training.recompute=selective is not for engine=deepspeed with deepspeed.zero_stage=2",
        ),
        ({"optimizer": replace(DEEPSPEED.optimizer, distributed_optimizer=False)}, "distributed_optimizer=false"),
        ({"deepspeed": at_stage(2, offload_parameters=True)}, "leave it out, or set deepspeed.zero_stage=3."),
        ({"engine": EngineName.megatron, "deepspeed": at_stage(2)}, "engine is megatron"),
    ],
)  # fmt: skip
def test_what_the_engine_cannot_do_is_refused(changes: dict, complaint: str) -> None:
    check_engine(DEEPSPEED)
    with pytest.raises(UserError, match=re.escape(complaint)):
        check_engine(replace(DEEPSPEED, **changes))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"reduce_buket_size": 1000}, "did you mean reduce_bucket_size?"),
        ({"stage": 3}, "none of the options a run may set"),
        ({"zero_quantized_weights": True}, "none of the options a run may set"),
        ({"reduce_bucket_size": "many"}, "engine_options.reduce_bucket_size is 'many'"),
        ({"reduce_bucket_size": 0}, "greater than 0"),
        ({"sub_group_size": 1000}, "sub_group_size is for stage 3"),
        ({"reduce_bucket_size": 10**12}, "it may be at most 10000000000"),
    ],
)
def test_options_are_checked_by_deepspeed_s_own_configuration(options: dict, complaint: str) -> None:
    check_deepspeed(replace(DEEPSPEED, deepspeed=at_stage(2, engine_options={"reduce_bucket_size": 1000})), 1)
    with pytest.raises(UserError, match=re.escape(complaint)):
        check_deepspeed(replace(DEEPSPEED, deepspeed=at_stage(2, engine_options=options)), 1)


def test_options_of_spread_modules_are_fewer() -> None:
    whole = replace(DEEPSPEED, deepspeed=at_stage(2, engine_options={"reduce_scatter": False}))
    check_deepspeed(whole, 1)
    with pytest.raises(UserError, match="reduce_scatter is not for parallel.expert_model_parallel_size=2"):
        check_deepspeed(replace(whole, parallel=ParallelConfig(expert_model_parallel_size=2)), 2)


def test_second_shards_divide_the_ranks_and_null_takes_an_option_back() -> None:
    shards = replace(DEEPSPEED, deepspeed=at_stage(3, engine_options={"zero_hpz_partition_size": 2}))
    check_deepspeed(shards, 4)
    for ranks in (1, 3):
        with pytest.raises(
            UserError, match=r"zero_hpz_partition_size \(2\) does not divide the number of ranks"
        ):
            check_deepspeed(shards, ranks)
    check_deepspeed(replace(DEEPSPEED, deepspeed=at_stage(2, engine_options={"sub_group_size": None})), 1)


def test_without_deepspeed_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "is_installed", lambda package: False)
    engine_of(tiny_config()).check(tiny_config(), 1)
    with pytest.raises(UserError, match=re.escape("rmoe-megatron[deepspeed]")):
        engine_of(DEEPSPEED).check(DEEPSPEED, 1)


def test_the_table_of_what_an_engine_can_do_is_that_of_the_rules() -> None:
    assert engine_table() in (Path(rmoe_megatron.engine.__file__).parent / "README.md").read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every stage a finished run, and one of Megatron-Core's engine, with all their checkpoints."""
    folder = tmp_path_factory.mktemp("deepspeed")
    config = str(make_run(folder))
    for stage in (1, 2, 3):
        zero = ["engine=deepspeed", f"deepspeed.zero_stage={stage}", f"run_dir={folder}/zero{stage}"]
        code, errors = rmoe("train", config, *zero, *QUIET, ranks=2)
        assert code == 0, errors
    code, errors = rmoe("train", config, f"run_dir={folder}/megatron", *QUIET)
    assert code == 0, errors
    return folder


def rewound(run: Path, name: str) -> Path:
    """A copy of a run as it was at step 10."""
    copy = run.with_name(name)
    shutil.copytree(run, copy)
    for checkpoint in list_checkpoints(copy):
        if checkpoint.step > 10:
            shutil.rmtree(checkpoint.path)
    return copy


def weights_of(run: Path, averaged: bool = False) -> dict[str, torch.Tensor]:
    return {name: place.read() for name, place in RunWeights(run, averaged=averaged).locations.items()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_adapters_are_trained_on_a_frozen_base_and_resumed(runs: Path, stage: int) -> None:
    """LoRA on the base's dense model, in bf16: the rest of the model is neither moved nor saved."""
    run_dir, base = runs / f"lora{stage}", runs / "dense"
    short = ["training.steps=6", "checkpoint.every=3", "recurrence=null", *QUIET]
    if not base.exists():
        code, errors = rmoe("train", str(runs / "config.yaml"), *short, "precision=bf16", f"run_dir={base}")
        assert code == 0, errors
    tuning = [f"fine_tuning.base={base}", "lora={layers: [0, 2], rank: 4}", "precision=bf16"]
    zero = ["engine=deepspeed", f"deepspeed.zero_stage={stage}", f"run_dir={run_dir}"]
    code, errors = rmoe("train", str(runs / "config.yaml"), *short, *tuning, *zero, ranks=2)
    assert code == 0, errors
    before, after = weights_of(base, averaged=True), weights_of(run_dir)
    added = after.keys() - before.keys()
    assert added
    assert all(".lora." in name for name in added)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    whole = losses(run_dir)
    shutil.rmtree(list_checkpoints(run_dir)[0].path)
    code, errors = rmoe("train", "--resume", str(run_dir), ranks=2)
    assert code == 0, errors
    assert losses(run_dir) == whole
    assert all(torch.equal(weights_of(run_dir)[name], after[name]) for name in added)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_resumed_run_is_bitwise_the_whole_one(runs: Path, stage: int) -> None:
    whole, copy = runs / f"zero{stage}", rewound(runs / f"zero{stage}", f"resumed{stage}")
    code, errors = rmoe("train", "--resume", str(copy), ranks=2)
    assert code == 0, errors
    for key in ("loss", "grad_norm", "validation_loss"):
        assert losses(copy, key) == losses(whole, key)
    assert len(losses(copy)) == 20
    for averaged in (False, True):
        expected, found = weights_of(whole, averaged), weights_of(copy, averaged)
        assert expected.keys() == found.keys()
        for name, weight in expected.items():
            assert torch.equal(found[name], weight), name


def test_second_shards_never_outlive_the_weights_they_were_cut_from(runs: Path) -> None:
    """zero_hpz_partition_size keeps copies of weights; validation with averages and resuming change the weights behind them."""
    whole, option = runs / "hpz", "deepspeed.engine_options={zero_hpz_partition_size: 2}"
    settings = ["engine=deepspeed", "deepspeed.zero_stage=3", option, f"run_dir={whole}", *QUIET]
    code, errors = rmoe("train", str(runs / "config.yaml"), *settings, ranks=2)
    assert code == 0, errors
    assert losses(whole) == losses(runs / "zero3")
    copy = rewound(whole, "hpz-resumed")
    code, errors = rmoe("train", "--resume", str(copy), ranks=2)
    assert code == 0, errors
    assert losses(copy) == losses(whole)


def test_another_stage_and_number_of_ranks_can_go_on(runs: Path) -> None:
    """A checkpoint is whole tensors, whoever cut them up."""
    copy = rewound(runs / "zero3", "other")
    for overrides, ranks in ((["deepspeed.zero_stage=2", "training.steps=15"], 1), (["deepspeed.zero_stage=1", "training.steps=20"], 4)):  # fmt: skip
        code, errors = rmoe(
            "train", "--resume", str(copy), *overrides, "training.micro_batch_size=2", ranks=ranks
        )
        assert code == 0, errors
    # The load-balancing loss depends on the size of micro-batches, the schedule on the number of steps.
    assert losses(copy) == pytest.approx(losses(runs / "zero3"), abs=5e-3)
    assert list(losses(copy)) == list(range(1, 21))


def test_modules_that_were_spread_are_resumed(runs: Path) -> None:
    """On the same ranks bitwise, and then each rank with all of them, at the third stage."""
    whole, spread = runs / "spread", ["parallel.expert_model_parallel_size=2", "deepspeed.zero_stage=2"]
    code, errors = rmoe(
        "train", str(runs / "config.yaml"), "engine=deepspeed", *spread, *QUIET, f"run_dir={whole}", ranks=2
    )
    assert code == 0, errors
    copy, other = rewound(whole, "spread-resumed"), rewound(whole, "spread-no-more")
    code, errors = rmoe("train", "--resume", str(copy), ranks=2)
    assert code == 0, errors
    assert losses(copy) == losses(whole)
    code, errors = rmoe(
        "train", "--resume", str(other), "parallel.expert_model_parallel_size=1", "deepspeed.zero_stage=3", ranks=2
    )  # fmt: skip
    assert code == 0, errors
    assert losses(other) == pytest.approx(losses(whole), abs=1e-4)
    assert losses(whole) == pytest.approx(losses(runs / "zero2"), abs=1e-4)


def test_options_of_one_stage_are_taken_back_for_another(runs: Path) -> None:
    run_dir, option = runs / "options", "deepspeed.engine_options.sub_group_size"
    short = ["training.steps=5", f"run_dir={run_dir}", *QUIET]
    code, errors = rmoe(
        "train", str(runs / "config.yaml"), "engine=deepspeed", "deepspeed.zero_stage=3", f"{option}=10000", *short
    )  # fmt: skip
    assert code == 0, errors
    other = ["train", "--resume", str(run_dir), "training.steps=8", "deepspeed.zero_stage=2"]
    code, errors = rmoe(*other)
    assert code == 2
    assert f"where the run has it set {option}=null" in errors
    code, errors = rmoe(*other, f"{option}=null")
    assert code == 0, errors


def test_stages_of_other_batches_without_clipping_train_as_with_megatron_core(runs: Path) -> None:
    """The number of micro-batches in a step changes in the middle; a norm of 0 is none to clip to."""
    stages = (
        "training.stages=[{steps: 4, sample_size: 8, micro_batch_size: 4, global_batch_size: 8}, "
        "{steps: 4, sample_size: 8, micro_batch_size: 2, global_batch_size: 16}]"
    )
    settings = ["training.steps=8", stages, "optimizer.clip_grad=0", "optimizer.ema_power=0.75", *QUIET]
    for name, engine in (("whole", []), ("two", ["engine=deepspeed", "deepspeed.zero_stage=2"]), ("three", ["engine=deepspeed", "deepspeed.zero_stage=3"])):  # fmt: skip
        run_dir = f"run_dir={runs}/stages-{name}"
        code, errors = rmoe("train", str(runs / "config.yaml"), *settings, *engine, run_dir, ranks=2)
        assert code == 0, errors
    for key in ("loss", "grad_norm", "validation_loss"):
        expected = losses(runs / "stages-whole", key)
        assert losses(runs / "stages-two", key) == pytest.approx(expected, rel=1e-4)
        assert losses(runs / "stages-three", key) == pytest.approx(expected, rel=1e-4)


def test_both_engines_find_the_same_weights_and_hold_them_alike(runs: Path) -> None:
    expected = weights_of(runs / "megatron")
    for stage in (1, 2, 3):
        found = weights_of(runs / f"zero{stage}")
        assert {name: (each.shape, each.dtype) for name, each in found.items()} == {
            name: (each.shape, each.dtype) for name, each in expected.items()
        }
        assert losses(runs / f"zero{stage}") == pytest.approx(losses(runs / "megatron"), abs=1e-3)


def test_a_run_goes_on_with_its_own_engine_alone(runs: Path) -> None:
    code, errors = rmoe("train", "--resume", str(runs / "zero1"), "engine=megatron", "training.steps=30")
    assert code == 2
    assert "was trained with engine=deepspeed" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("base", "engine"),
    [
        ("zero3", ["engine=megatron"]),
        ("megatron", ["engine=deepspeed", "deepspeed.zero_stage=1"]),
        ("megatron", ["engine=deepspeed", "deepspeed.zero_stage=2", "parallel.expert_model_parallel_size=2"]),
        ("megatron", ["engine=deepspeed", "deepspeed.zero_stage=3"]),
    ],
)
def test_either_engine_starts_from_the_other_s_weights(runs: Path, base: str, engine: list[str]) -> None:
    """Of a base of which one block is trained: what is frozen is not saved, and every stage trains the rest alone."""
    run_dir = runs / f"from-{base}-{engine[-1]}"
    tuning = [f"fine_tuning.base={runs / base}", "fine_tuning.trainable=blocks", "fine_tuning.blocks=[1]"]
    code, errors = rmoe(
        "train", str(runs / "config.yaml"), *tuning, *engine, *QUIET, f"run_dir={run_dir}", "training.steps=5", ranks=2
    )  # fmt: skip
    assert code == 0, errors
    before, after = weights_of(runs / base, averaged=True), weights_of(run_dir)
    assert before.keys() == after.keys()
    changed = {name for name, weight in before.items() if not torch.equal(after[name], weight)}
    assert changed
    assert all(name.startswith("transformer.layers.1.") for name in changed)


def test_a_run_is_exported_and_inspected_like_any_other(runs: Path) -> None:
    code, errors = rmoe("convert", "to-hf", str(runs / "zero3"), str(runs / "exported"))
    assert code == 0, errors
    from safetensors.torch import load_file

    (file,) = (runs / "exported" / "transformer").glob("*.safetensors")
    exported, averages = load_file(file), weights_of(runs / "zero3", averaged=True)
    weight = "pos_embed.proj.weight"
    assert torch.equal(exported[weight], averages[weight])
    code, errors = rmoe("inspect", str(runs / "zero3"))
    assert code == 0, errors


def describe(config: RunConfig) -> str:
    from rmoe_megatron.model.precision.backend import describe_kernels

    return describe_kernels(config, engine_of(config).describe_adam(config, on_cuda=False))


def test_the_line_about_kernels_names_the_engine() -> None:
    assert "DeepSpeed's ZeRO 2" in describe(replace(DEEPSPEED, deepspeed=at_stage(2)))
    assert "DeepSpeed" not in describe(tiny_config())
