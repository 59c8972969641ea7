"""The GPU checks on tiny models on the CPU: what they find, what they skip and say so, what a failing one does."""

import json
import logging
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gpu_check
import gpu_check_engines
import gpu_check_parity
import gpu_check_speed
import ledger
import pytest
import torch
from benchmark_step import Step, engine_step
from gpu_check import CHECKS, Check, run_checks
from gpu_check_report import COLUMNS, GOALS, Report, Result, judge
from gpu_check_speed import speed_config, warning_places
from gpu_check_workplace import Skipped, Workplace, fitting, parity_model, run_config, with_fp8
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from rmoe_megatron.config.run import Fp8Recipe, Precision, RunConfig
from rmoe_megatron.distributed.megatron_on_cpu import use_cpu
from rmoe_megatron.engine.megatron.engine import MegatronEngine
from rmoe_megatron.model.flops import training_flops_per_sample
from rmoe_megatron.model.recurrence.experts import Experts
from tests.support.configurations import one_rank

CPU = torch.device("cpu")
NEED_A_GPU = {"transformer_engine", *(f"fp8_{recipe.value}" for recipe in Fp8Recipe)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of all checks has written."""
    output = tmp_path_factory.mktemp("gpu_check")
    record = ["--record", "gpu_check", "--records", str(output / "records")]
    assert gpu_check.main(["--device", "cpu", "--small", "--output", str(output), *record]) == 0
    return output


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {each["name"]: each for each in json.loads((folder / "gpu_check.json").read_text())["results"]}


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(CPU, small=True, folder=tmp_path)


def test_what_needs_a_gpu_is_skipped_by_name_and_the_rest_runs(results: dict[str, dict[str, Any]]) -> None:
    assert list(results) == [each.name for each in CHECKS]
    for name, result in results.items():
        assert result["status"] == ("skipped" if name in NEED_A_GPU else "ok"), result
    assert any("MegatronEngine.step" in place for place in results["synchronisations"]["figures"]["places"])
    assert "Transformer Engine" in results["fp8_mxfp8"]["reason"]


def test_the_engines_agree(
    results: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, workplace: Workplace
) -> None:
    errors = [value for name, value in results["deepspeed"]["figures"].items() if name.endswith("_error")]
    assert len(errors) == 5
    assert max(errors) < 1e-4
    monkeypatch.setattr(gpu_check_engines, "is_installed", lambda package: False)
    with pytest.raises(Skipped, match="DeepSpeed is not installed"):
        gpu_check_engines.parity_deepspeed(workplace)


def test_steps_and_products_agree(results: dict[str, dict[str, Any]]) -> None:
    fp32, bf16 = results["parity_fp32"]["figures"], results["parity_bf16"]["figures"]
    assert fp32["gradient_error"] <= 1e-6
    assert 1e-4 < bf16["gradient_error"] <= 1.1 * bf16["gradient_error_of_cpu_bf16"] < 0.05
    assert fp32["gradients"] > 50
    for precision, least in (("fp32", 0), ("bf16", 1e-4)):
        figures = results[f"grouped_mm_{precision}"]["figures"]
        for kind in ("low_rank", "full_rank"):
            assert least <= figures[f"{kind}_error"] <= 2 * figures[f"{kind}_error_of_packed"] + 1e-5


def test_speeds_are_flops_by_seconds(results: dict[str, dict[str, Any]]) -> None:
    workplace = Workplace(CPU, small=True, folder=Path())
    flops = {}
    for variant in ("dense", "dense_compiled", "m2_t2", "m5_t5"):
        config = speed_config(workplace, variant)
        sizes = results[f"speed_{variant}"]["figures"]["sizes"]
        assert [each["pixels"] for each in sizes] == ([128] if variant == "dense_compiled" else [64, 128])
        for each in sizes:
            tokens = (each["pixels"] // 16) ** 2
            flops[variant, each["pixels"]] = training_flops_per_sample(config, tokens)
            assert each["flops"] == each["batch"] * flops[variant, each["pixels"]]
            assert each["tflops"] * each["seconds"] * 1e12 == pytest.approx(each["flops"])
            assert each["mfu"] is None  # no data sheet states a peak
            assert 1e-4 < each["step_gb"] < 1
    dense, recurrent = (
        results[f"speed_{name}"]["figures"]["sizes"][-1]["seconds"] for name in ("dense", "m5_t5")
    )
    assert results["speed_m5_t5"]["figures"]["time_over_flops_128"] == pytest.approx(
        recurrent / dense / (flops["m5_t5", 128] / flops["dense", 128])
    )
    figures = results["diffusers_compiled"]["figures"]
    assert figures["diffusers_over_ours"] == pytest.approx(figures["seconds"] / figures["our_seconds"])


def test_the_timeline_is_a_trace_and_a_table(folder: Path, results: dict[str, dict[str, Any]]) -> None:
    operations = results["timeline"]["figures"]["operations"]
    assert len(operations) == 20
    assert operations == sorted(operations, key=lambda each: -each["seconds"])
    assert "aten::mm" in {each["name"] for each in operations}
    trace = json.loads((folder / results["timeline"]["figures"]["trace"]).read_text())
    assert "aten::mm" in {each["name"] for each in trace["traceEvents"]}


def test_the_row_fits_the_results_file(folder: Path) -> None:
    lines = (folder / "gpu_check.md").read_text().splitlines()
    assert lines[0] in Path("tools/benchmark_results.md").read_text().splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert len(cells) == len(COLUMNS) == lines[0].count("|") - 1
    row = dict(zip(COLUMNS, cells, strict=True))
    assert row["torch"] == torch.__version__
    assert "tiny models" in row["device"]
    assert row["dense compiled, 1024"].endswith("samples/s")
    assert row["FP8 / bf16"] == row["waits a step"] == "-"
    assert not list(folder.glob(".*"))


def test_the_row_is_in_the_ledger(folder: Path) -> None:
    (record,) = ledger.load(folder / "records").values()
    cells = (folder / "gpu_check.md").read_text().splitlines()[2].strip("| ").split(" | ")
    assert list(record["figures"].values()) == cells
    assert record["code"].keys() >= {"rmoe_megatron/model", "rmoe_megatron/engine"}


def test_goals() -> None:
    found = {
        "speed_dense": {"sizes": [{"mfu": 0.9}, {"mfu": 0.45}]},
        "speed_dense_compiled": {"sizes": [{"mfu": 0.5}]},
        "speed_m2_t2": {"time_over_flops_512": 1.0, "time_over_flops_1024": 1.05},
        "speed_m5_t5": {"time_over_flops_512": 1.2, "time_over_flops_1024": 1.0},
        "fp8_delayed": {"speed_over_bf16": 1.1},
        "fp8_tensorwise": {"speed_over_bf16": 1.35},
    }
    verdicts = judge(GOALS, found, small=False)
    assert [(each.measured, each.verdict) for each in verdicts] == [
        (0.5, "met"), (1.35, "met"), (1.2, "not met"), (None, "not measured"),
    ]  # fmt: skip
    assert {each.verdict for each in judge(GOALS, found, small=True)} == {"not measured"}
    assert judge(GOALS, {"diffusers_compiled": {"diffusers_over_ours": 1.29}}, False)[-1].verdict == "not met"
    unknown_peak = {"speed_dense": {"sizes": [{"mfu": None}, {"mfu": None}]}}
    assert judge(GOALS, unknown_peak, False)[0].verdict == "not measured"


def test_a_failing_check_fails_the_run_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(workplace: Workplace) -> dict[str, Any]:
        raise RuntimeError("planted | fault.\nMore of it")

    planted = [Check("planted", fail, 1), Check("good", lambda _: {"answer": 42}, 1)]
    monkeypatch.setattr(gpu_check, "CHECKS", planted)
    assert gpu_check.main(["--device", "cpu", "--small", "--output", str(tmp_path)]) == 1
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    failed, good = content["results"]
    assert (failed["status"], failed["reason"]) == ("failed", "planted | fault")
    assert "in fail" in failed["traceback"]
    assert (good["status"], good["figures"]) == ("ok", {"answer": 42})
    output = capsys.readouterr()
    assert "| planted | failed |" in output.out
    assert "2/2 good" in output.err


def test_what_does_not_fit_into_the_time_is_skipped_by_name(workplace: Workplace) -> None:
    def wait(_: Workplace) -> dict[str, Any]:
        time.sleep(30)
        return {}

    workplace = replace(workplace, small=False)
    late, never = run_checks([Check("late", wait, 0.2), Check("never", wait, 9)], workplace, minutes=2 / 60)
    assert (late.status, never.status) == ("skipped", "skipped")
    assert "stopped after" in (late.reason or "")
    assert "it may take 9 s" in (never.reason or "")
    assert late.seconds < 10


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--device", "cpu"], "error: SD3-medium on a CPU would take hours"),
        (["--small", "--device", "cuda"], "error: device is cuda but PyTorch finds no GPU"),
        (["--small", "--output", str(tmp_path / "file")], "error: --output"),
    ):
        assert gpu_check.main(arguments) == 2
        errors = capsys.readouterr().err
        assert errors.startswith(message)
        assert errors.count("\n") == 1


def test_a_different_step_is_found() -> None:
    reference = {"loss": torch.ones(1), "grad_norm": torch.ones(1), "a": torch.ones(9), "b": torch.zeros(4)}
    same = gpu_check_parity.compare(reference, reference)
    assert same["gradient_error"] == same["worst_gradient_error"] == same["loss_error"] == 0
    step = reference | {"a": torch.ones(9).index_fill(0, torch.tensor([0]), 1.3), "loss": torch.tensor([0.9])}
    found = gpu_check_parity.compare(step, reference)
    assert found["gradient_error"] == pytest.approx(0.1)
    assert (found["worst_gradient"], found["gradients"]) == ("a", 2)
    assert found["loss_error"] == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"gradient_error is 0\.1, more than 0\.05"):
        gpu_check_parity.within(found | {"loss_error": 0}, 0.05)
    with pytest.raises(ValueError, match="loss_error is nan"):
        gpu_check_parity.within(found | {"loss_error": float("nan")}, 1)
    with pytest.raises(ValueError, match="1 gradients are in one of the steps only, the first is c"):
        gpu_check_parity.compare(reference | {"c": torch.ones(1)}, reference)


def test_every_fp8_recipe_is_compared(workplace: Workplace) -> None:
    """In emulation: what Transformer Engine computes is held to the same figures."""
    with one_rank(run_config(parity_model(True), Precision.bf16, CPU, 1)):
        for recipe in Fp8Recipe:
            figures = gpu_check_parity.fp8_errors(workplace, recipe, Precision.fp8_emulated)
            assert 1e-3 < figures["gradient_error"] == figures["gradient_error_of_emulated"] < 0.3


def test_the_speed_of_fp8_is_measured(workplace: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated = partial(with_fp8, precision=Precision.fp8_emulated)
    monkeypatch.setattr(gpu_check_speed, "with_fp8", emulated)
    with one_rank(run_config(parity_model(True), Precision.bf16, CPU, 1)):
        figures = gpu_check_speed.speed_fp8(workplace, Fp8Recipe.tensorwise)
        bf16 = workplace.measured["dense"][-1]
        workplace.release()
    fp8 = figures["sizes"][-1]
    assert figures["text_length"] == 16  # 8, padded
    assert figures["speed_over_bf16"] == pytest.approx(bf16.seconds / fp8["seconds"])


@pytest.mark.parametrize(
    ("variant", "precision"),
    [
        ("dense", Precision.bf16), ("dense", Precision.fp32), ("dense_compiled", Precision.bf16),
        ("m2_t2", Precision.bf16), ("m2_t2", Precision.fp32),
    ],
)  # fmt: skip
def test_nothing_of_a_trainer_remains(workplace: Workplace, variant: str, precision: Precision) -> None:
    config = replace(speed_config(workplace, variant), precision=precision)
    with one_rank(config):
        assert remains_of(workplace, config, lambda step: step(0)) == []


def test_nothing_of_a_trainer_remains_after_a_step_that_fails(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Tensor:
        raise RuntimeError("planted")

    def steps(step: Step) -> None:
        step(0)
        monkeypatch.setattr(Experts, "forward", fail)
        with pytest.raises(RuntimeError, match="planted"):
            step(1)

    config = speed_config(workplace, "m2_t2")
    with one_rank(config):
        assert remains_of(workplace, config, steps) == []


@pytest.fixture(autouse=True)
def nothing_kept_by_log_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest keeps the records of a test, and those of the compiler hold what it compiled."""
    monkeypatch.setattr(logging.getLogger("torch"), "propagate", False)


def remains_of(workplace: Workplace, config: RunConfig, steps: Callable[[Step], None]) -> list[str]:
    """Run steps of a trainer, give it back, and return the names of what is still there of it."""
    engine = workplace.trainer("one", config)
    assert isinstance(engine, MegatronEngine)
    steps(engine_step(engine, config, workplace.device))
    objects = {name: weakref.ref(each) for name, each in parts_of(engine)}
    # A view, or the autograd graph, may hold memory whose tensor is gone for Python.
    memory = {name: StorageWeakRef(each.untyped_storage()) for name, each in tensors_of(engine)}
    assert {"moment exp_avg", "gradient"} <= {name.rpartition(" of ")[0] for name in memory}
    del engine
    workplace.release()
    return [name for name, reference in objects.items() if reference() is not None] + [
        name for name, reference in memory.items() if not reference.expired()
    ]


def parts_of(engine: MegatronEngine) -> Iterator[tuple[str, Any]]:
    """Yield the engine, its optimizer and all modules by name."""
    yield "engine", engine
    yield "optimizer", engine.optimizer
    for chunk in engine.model.wrapped:
        yield from chunk.named_modules(prefix="chunk")


def tensors_of(engine: MegatronEngine) -> Iterator[tuple[str, Tensor]]:
    """Yield weights, gradients, the buffers they lie in, main weights and moments by name."""
    for chunk in engine.model.wrapped:
        for number, buffer in enumerate((*chunk.buffers, *chunk.expert_parallel_buffers)):
            yield f"gradients of buffer {number}", buffer.grad_data
            yield f"weights of buffer {number}", buffer.param_data
        for name, parameter in chunk.named_parameters():
            yield f"weight of {name}", parameter
            yield f"gradient of {name}", parameter.main_grad
    for part in engine.optimizer.chained_optimizers:
        for number, (parameter, state) in enumerate(part.optimizer.state.items()):
            yield f"main weight of {number}", parameter
            yield from ((f"moment {name} of {number}", moment) for name, moment in state.items())


def test_waits_are_counted_by_place() -> None:
    def action() -> None:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    places = warning_places(action, "called a synchronizing CUDA operation")
    assert places.total() == 2
    assert [place.rpartition(":")[0] for place in places] == ["tools/test_gpu_check.py"]


def test_a_batch_that_is_too_large_is_halved() -> None:
    use_cpu()  # its torch.cuda.empty_cache
    tried = []

    def action(batch: int) -> int:
        tried.append(batch)
        if batch > 2:
            raise torch.OutOfMemoryError
        return batch

    assert fitting(8, action) == 2
    assert tried == [8, 4, 2]


def test_a_reason_is_in_the_report() -> None:
    result = Result("x", "skipped", 0.0, str(Skipped("no such thing: get it")))
    report = Report({"device": "d", "torch": None, "transformer_engine": None}, False, [result])
    assert "| x | skipped | 0.0 | no such thing: get it |" in report.markdown()
    assert report.row() == ["d", *["-"] * (len(COLUMNS) - 1)]
