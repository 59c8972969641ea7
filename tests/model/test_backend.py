"""What backend and precision ask for, what is here, and what a run says of it."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from rmoe_megatron.config.run import Backend, Device, Fp8Config, Fp8Recipe, Precision, RunConfig
from rmoe_megatron.config.validation import validate
from rmoe_megatron.distributed.processor import ProductSeconds
from rmoe_megatron.engine.registry import engine_of
from rmoe_megatron.errors import UserError
from rmoe_megatron.model.precision import backend
from rmoe_megatron.model.precision.backend import (
    check_backend,
    describe_backend,
    describe_kernels,
    fits_grouped_mm,
    is_installed,
    resolve_precision,
    warn_of_new_histories,
    warn_of_slow_precision,
)
from rmoe_megatron.model.precision.layers import layers_of
from rmoe_megatron.model.transformer_config import transformer_config
from rmoe_megatron.training.preflight import check_device
from tests.support.configurations import RECURRENCE, one_rank, tiny_config

CONFIG = replace(tiny_config(replace(RECURRENCE, rank=8)), device=Device.auto, precision=Precision.bf16)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """A machine with or without a GPU and packages; the entries can be changed."""
    has = {"gpu": True, "transformer_engine": True, "apex": False, "apex.optimizers": False}
    monkeypatch.setattr(backend, "runs_on_cuda", lambda device: has["gpu"] and device is not Device.cpu)
    monkeypatch.setattr(backend, "is_installed", lambda package, part="": has[f"{package}.{part}".strip(".")])
    return has


@pytest.mark.parametrize(
    ("changes", "gpu", "installed", "column", "row"),
    [
        ({}, True, True, "TEColumnParallelLinear", "TERowParallelLinear"),
        ({}, True, False, "ColumnParallelLinear", "RowParallelLinear"),
        ({}, False, True, "ColumnParallelLinear", "RowParallelLinear"),
        ({"device": Device.cpu}, True, True, "ColumnParallelLinear", "RowParallelLinear"),
        ({"backend": Backend.local}, True, True, "ColumnParallelLinear", "RowParallelLinear"),
        (
            {"backend": Backend.transformer_engine},
            True,
            True,
            "TEColumnParallelLinear",
            "TERowParallelLinear",
        ),
        ({"precision": Precision.fp8}, True, True, "TEColumnParallelLinear", "TERowParallelLinear"),
        (
            {"precision": Precision.fp8_emulated},
            True,
            True,
            "EmulatedColumnParallelLinear",
            "EmulatedRowParallelLinear",
        ),
    ],
)
def test_blocks_are_built_of_the_layers_that_are_there(
    machine: dict[str, bool],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict,
    gpu: bool,
    installed: bool,
    column: str,
    row: str,
) -> None:
    """The classes themselves are looked at, Transformer Engine's through stand-ins of their names."""
    extension = ModuleType("megatron.core.extensions.transformer_engine")
    for name in ("TEColumnParallelLinear", "TERowParallelLinear"):
        setattr(extension, name, type(name, (), {}))
    monkeypatch.setitem(sys.modules, extension.__name__, extension)
    machine |= {"gpu": gpu, "transformer_engine": installed}
    config = replace(CONFIG, fp8=Fp8Config(Fp8Recipe.tensorwise, 0, 0), **changes)
    check_backend(config)
    layers = layers_of(config, 0)
    made = (layers.column_parallel_linear, layers.row_parallel_linear)
    assert tuple(getattr(each, "func", each).__name__ for each in made) == (column, row)


@pytest.mark.parametrize("changes", [{"precision": Precision.fp8}, {"backend": Backend.transformer_engine}])
def test_what_is_missing_is_named(machine: dict[str, bool], changes: dict) -> None:
    config = replace(CONFIG, **changes)
    machine["transformer_engine"] = False
    with pytest.raises(
        UserError,
        match=r"needs Transformer Engine, which is not installed: pip install 'rmoe-megatron\[gpu\]'",
    ):
        check_backend(config)
    machine["gpu"] = False
    with pytest.raises(UserError, match="needs a GPU, and this run has none"):
        check_backend(config)


def test_layers_that_are_not_traced_are_not_compiled(machine: dict[str, bool]) -> None:
    compiled = replace(CONFIG, training=replace(CONFIG.training, compile=True))
    with pytest.raises(UserError, match="not Transformer Engine's; set backend=local"):
        check_backend(compiled)
    check_backend(replace(compiled, backend=Backend.local))


def test_a_line_says_what_is_fused_and_why_the_rest_is_not(machine: dict[str, bool]) -> None:
    def line(config: RunConfig = CONFIG, **has: bool) -> str:
        machine.update(has)
        adam = engine_of(config).describe_adam(config, machine["gpu"] and config.device is not Device.cpu)
        return describe_kernels(config, adam)

    assert "\n" not in line()
    assert "linear Transformer Engine's, attention fused" in line()
    assert "Adam fused (Transformer Engine's), modules grouped_mm" in line()
    assert "in FP8 mxfp8" in line(replace(CONFIG, precision=Precision.fp8, fp8=Fp8Config(Fp8Recipe.mxfp8)))
    assert "Megatron-Core's (backend=local)" in line(replace(CONFIG, backend=Backend.local))
    nvfp4 = line(replace(CONFIG, precision=Precision.nvfp4_emulated))
    assert "rounded as NVFP4 (emulated)" in nvfp4
    assert "modules batched (rounded each by itself)" in nvfp4
    assert "Transformer Engine is not installed: pip install" in line(transformer_engine=False)
    odd = replace(CONFIG, recurrence=replace(RECURRENCE, rank=12))
    assert "modules batched (grouped_mm needs multiples of 16 bytes, not H=32, rank=12)" in line(odd)
    assert "Adam fused (PyTorch's: no" in line()
    assert "no Apex (the apex here is PyPI's, another project))" in line(apex=True)
    assert "Adam fused (Apex's)" in line(**{"apex.optimizers": True})
    assert "modules" not in line(replace(CONFIG, recurrence=None)).partition("Adam")[2]
    assert "Megatron-Core's (Transformer Engine needs a GPU)" in line(gpu=False)
    assert "Adam fused (PyTorch's: others need a GPU)" in line(transformer_engine=True)
    compiled = replace(CONFIG, training=replace(CONFIG.training, compile=True))
    assert line().endswith("blocks not compiled (training.compile).")
    assert line(compiled).endswith("blocks compiled.")


def test_a_sentence_says_what_a_run_computes_with(machine: dict[str, bool]) -> None:
    rest = "; --verbose says which kernels are used and why."
    bf16 = replace(CONFIG, precision=Precision.bf16)
    assert describe_backend(bf16) == (
        f"The run computes in bf16 on a GPU with the layers of Transformer Engine{rest}"
    )
    assert describe_backend(replace(bf16, backend=Backend.local)) == (
        f"The run computes in bf16 on a GPU with the layers of Megatron-Core{rest}"
    )
    machine["gpu"] = False
    assert describe_backend(replace(CONFIG, precision=Precision.fp32)) == (
        f"The run computes in fp32 on the CPU with the layers of Megatron-Core{rest}"
    )


@pytest.mark.parametrize(
    ("asked", "gpu", "bf16_is_fast", "expected"),
    [
        (Precision.auto, True, False, Precision.bf16),
        (Precision.auto, False, True, Precision.bf16),
        (Precision.auto, False, False, Precision.fp32),
        (Precision.bf16, False, False, Precision.bf16),
        (Precision.fp32, True, True, Precision.fp32),
        (Precision.fp8_emulated, False, False, Precision.fp8_emulated),
    ],
)
def test_auto_is_the_faster_precision(
    machine: dict[str, bool],
    monkeypatch: pytest.MonkeyPatch,
    asked: Precision,
    gpu: bool,
    bf16_is_fast: bool,
    expected: Precision,
) -> None:
    machine["gpu"] = gpu
    monkeypatch.setattr(backend, "bf16_is_fast", lambda: bf16_is_fast)
    config = replace(CONFIG, precision=asked)
    validate(config, world_size=1)
    assert resolve_precision(config) == replace(config, precision=expected)


def test_slow_bf16_is_told(machine: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    machine["gpu"] = False
    monkeypatch.setattr(backend, "bf16_is_fast", lambda: False)
    monkeypatch.setattr(backend, "product_seconds", lambda: ProductSeconds(fp32=0.25, bf16=7.0))
    for precision in (Precision.bf16, Precision.fp8_emulated):
        line = warn_of_slow_precision(replace(CONFIG, precision=precision))
        assert line is not None
        assert f"precision={precision.value} multiplies in bf16" in line
        assert "takes 28 times as long as in fp32" in line
    assert warn_of_slow_precision(replace(CONFIG, precision=Precision.fp32)) is None
    machine["gpu"] = True
    assert warn_of_slow_precision(CONFIG) is None


@pytest.mark.parametrize(
    ("changes", "micro_batch", "expected"),
    [
        # The tiny model has 16 patches and 5 tokens of text, and 2 heads.
        ({"precision": Precision.fp32}, 4, "by batched products (the faster way here; scores are kept)"),
        ({"precision": Precision.fp32}, 32768, "fused (PyTorch's scaled_dot_product_attention)"),
        ({"precision": Precision.bf16}, 4, "fused (PyTorch's scaled_dot_product_attention)"),
    ],
)
def test_the_line_says_how_attention_is_computed(
    machine: dict[str, bool],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict,
    micro_batch: int,
    expected: str,
) -> None:
    machine["gpu"] = False
    monkeypatch.setattr(backend, "bf16_is_fast", lambda: False)
    training = replace(CONFIG.training, micro_batch_size=micro_batch, global_batch_size=micro_batch)
    assert f"attention {expected}, norms" in describe_kernels(
        replace(CONFIG, training=training, **changes), "PyTorch's"
    )


def test_what_is_installed_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex" / "optimizers").mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('imported')")
    assert not is_installed("apex")
    monkeypatch.syspath_prepend(tmp_path)
    assert is_installed("apex")
    assert is_installed("apex", "optimizers")
    assert not is_installed("apex", "normalization")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("hidden", "rank"), [(32, 8), (32, 4), (32, 2), (36, 8), (30, 8), (32, None), (30, None)]
)
def test_what_fits_is_what_pytorch_takes(hidden: int, rank: int | None, dtype: torch.dtype) -> None:
    """grouped_mm itself is asked, with the strides of the modules' weights."""

    def project(inputs: int, outputs: int) -> None:
        weight = torch.randn(2, outputs, inputs, dtype=dtype)
        offsets = torch.tensor([3, 8], dtype=torch.int32)
        F.grouped_mm(torch.randn(8, inputs, dtype=dtype), weight.transpose(1, 2), offs=offsets)

    def projects() -> bool:
        try:
            project(hidden, 3 * (rank or hidden))
            if rank is not None:
                project(rank, hidden)
        except RuntimeError as error:
            return "multiple of 16 bytes" not in str(error)
        return True

    assert fits_grouped_mm(hidden, rank, dtype.itemsize) is projects()


@pytest.mark.parametrize("recipe", Fp8Recipe)
def test_megatron_core_gets_the_recipe(recipe: Fp8Recipe) -> None:
    kept = 0 if recipe is Fp8Recipe.delayed else 1
    config = replace(tiny_config(None), precision=Precision.fp8, fp8=Fp8Config(recipe, kept, kept))
    with one_rank(config):
        found = transformer_config(config)
    assert found.bf16
    assert (found.fp8, found.fp8_recipe) == (
        "hybrid" if recipe.value in ("delayed", "tensorwise") else "e4m3",
        recipe.value,
    )
    assert found.first_last_layers_bf16 is (kept > 0)
    assert (found.num_layers_at_start_in_bf16, found.num_layers_at_end_in_bf16) == (kept, kept)


def test_a_run_is_refused_before_it_starts(machine: dict[str, bool]) -> None:
    machine["gpu"] = False
    with pytest.raises(UserError, match="precision=fp8 needs a GPU"):
        check_device(replace(CONFIG, precision=Precision.fp8))
    check_device(CONFIG)


def test_a_resumed_run_says_that_delayed_scaling_begins_anew(machine: dict[str, bool]) -> None:
    config = replace(CONFIG, precision=Precision.fp8, fp8=Fp8Config(Fp8Recipe.delayed, 0, 0))
    line = warn_of_new_histories(config, 40)
    assert line is not None
    assert "it begins anew after step 40" in line
    assert warn_of_new_histories(config, 0) is None, "nothing is lost by a run that begins"
    for kept in (
        replace(config, precision=Precision.fp8_emulated),  # whose histories a checkpoint holds
        replace(config, fp8=Fp8Config(Fp8Recipe.tensorwise, 0, 0)),
        replace(config, precision=Precision.bf16),
    ):
        assert warn_of_new_histories(kept, 40) is None
