"""What a rank holds under either engine is what its parameters take by the closed form."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from benchmark_parallel import ENGINES, expected_bytes, main, measure

from rmoe_megatron.config.run import DeepSpeedConfig, Precision, RunConfig
from tests.support.configurations import MODEL, RECURRENCE, tiny_config
from tests.support.ranks import run_on_ranks

SMALL_BUCKET = DeepSpeedConfig(engine_options={"reduce_bucket_size": 100_000})


def in_precision(precision: Precision) -> RunConfig:
    model = replace(MODEL, hidden_size=192)
    return tiny_config(replace(RECURRENCE, rank=16), model=model, precision=precision, deepspeed=SMALL_BUCKET)


def test_bytes_are_those_of_the_closed_form(tmp_path: Path) -> None:
    cases = {each.value: in_precision(each) for each in (Precision.fp32, Precision.bf16)}
    job = partial(measure, names=ENGINES["both"], repeats=1)
    for rows in run_on_ranks(2, cases, tmp_path, job).values():
        assert [row["name"] for row in rows] == ["Megatron-Core", "ZeRO 1", "ZeRO 2", "ZeRO 3"]
        for row in rows:
            assert row["held"] == pytest.approx(row["expected"], rel=0.02), row
            assert row["seconds"] > 0


@pytest.mark.parametrize(
    ("name", "precision", "bytes_each"),
    [
        ("Megatron-Core", Precision.fp32, 4 + 4 + 8 / 4),
        ("Megatron-Core", Precision.bf16, 2 + 4 + 12 / 4),
        ("ZeRO 2", Precision.bf16, 2 + (4 + 12) / 4),
        ("ZeRO 3", Precision.fp32, (4 + 4 + 12) / 4),
    ],
)
def test_the_closed_form(name: str, precision: Precision, bytes_each: float) -> None:
    bucket = 4 * 100_000 if name == "ZeRO 3" else 0
    found = expected_bytes(name, in_precision(precision), parameters=10**6, ranks=4)
    assert found == pytest.approx(bytes_each * 10**6 + bucket)


def test_a_mistake_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["benchmark_parallel.py", "configs/shapes_tiny.yaml", "precison=bf16", "--repeats", "2"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "did you mean precision?" in capsys.readouterr().err
