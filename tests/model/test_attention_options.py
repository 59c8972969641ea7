"""Exclusive attention and gates without the timestep: exports, layouts and refusals; the reference is in test_recurrence."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from rmoe_megatron.config.layout_checks import check_layout
from rmoe_megatron.config.model import RecurrenceConfig
from rmoe_megatron.config.run import Recompute
from rmoe_megatron.conversion.weight_names import to_diffusers
from rmoe_megatron.errors import UserError
from rmoe_megatron.model.attention import without_own_value
from rmoe_megatron.model.build import build_transformer
from rmoe_megatron.model.checks import check_model
from rmoe_megatron.pretrained.architecture import transformer_arguments, transformer_class
from tests.distributed.test_parity import assert_same_run
from tests.model.test_flops import DIT
from tests.support.configurations import MODEL, RECURRENCE, one_rank, randomise, tiny_config
from tests.support.ranks import MMDIT, RECURRENT, configuration, layout, run_on_ranks, train

EXCLUSIVE = replace(MODEL, exclusive_attention=True)
UNMODULATED = replace(RECURRENCE, gate_inputs=["unmodulated_tokens", "conditioning"], steps=3)


def test_what_is_left_is_orthogonal_to_the_own_value() -> None:
    attended, own = torch.randn(5, 2, 12), torch.randn(5, 2, 3, 4)
    own[0, 0, 0] = 0
    left = without_own_value(attended, own).view_as(own)
    assert (left * own).sum(-1).abs().max() < 1e-5
    assert torch.equal(left[0, 0, 0], attended.view_as(own)[0, 0, 0])
    # What was taken out is along the own value: nothing of a plane through both is lost but that.
    torch.testing.assert_close(
        without_own_value(left.flatten(2), own).view_as(own), left, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("model", "recurrence"),
    [
        (EXCLUSIVE, None),
        (EXCLUSIVE, RECURRENCE),
        (replace(EXCLUSIVE, rope_theta=100.0), UNMODULATED),
        (MODEL, UNMODULATED),
        (DIT, replace(UNMODULATED, gate_inputs=["unmodulated_tokens"])),
    ],
    ids=["exclusive", "exclusive-recurrent", "all", "unmodulated", "unmodulated-dit"],
)
def test_exported_transformer_equals_the_training_model(model, recurrence: RecurrenceConfig | None) -> None:  # type: ignore[no-untyped-def]
    config = tiny_config(recurrence, model=model)
    generator = torch.Generator().manual_seed(2)
    latents, timestep = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([15.0, 870.0])
    text, pooled = torch.randn(2, 5, 12, generator=generator), torch.randn(2, 10, generator=generator)
    ours = {"text_hidden_states": text, "text_pooled": pooled}
    theirs = {"encoder_hidden_states": text, "pooled_projections": pooled}
    if model.is_class_conditional:
        ours = theirs = {"class_labels": torch.tensor([3, 7])}
    with one_rank(config), torch.no_grad():
        transformer = build_transformer(config).eval()
        randomise(transformer, std=0.4)
        expected = transformer(latents, timestep, torch.arange(2), **ours)
        other = transformer_class(config)(**transformer_arguments(config)).eval()
        other.load_state_dict(to_diffusers(transformer.state_dict(), config.model))
        assert (other(latents, timestep=timestep, **theirs).sample - expected).norm() < 1e-5 * expected.norm()
        # Without the option the output is another one.
        plain = replace(
            config,
            model=replace(model, exclusive_attention=False),
            recurrence=recurrence
            and replace(recurrence, gate_inputs=["tokens", *recurrence.gate_inputs[1:]]),
        )
        without = build_transformer(plain).eval()
        without.load_state_dict(transformer.state_dict())
        assert (
            without(latents, timestep, torch.arange(2), **ours) - expected
        ).norm() > 1e-4 * expected.norm()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny_config(None, model=replace(EXCLUSIVE, dual_attention_layers=[0])), "second attention"),
        (tiny_config(None, model=replace(DIT, exclusive_attention=True)), "a DiT has none"),
        (tiny_config(replace(RECURRENCE, gate_inputs=["tokens", "unmodulated_tokens"])), "gate_inputs"),
    ],
)
def test_what_does_not_go_together_is_refused(config, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message):
        check_model(config)


def test_exclusive_attention_is_not_for_context_parallelism() -> None:
    with pytest.raises(UserError, match="exclusive_attention"):
        check_layout(tiny_config(None, model=EXCLUSIVE, parallel=layout(cp=2)), 2)


# Text of five tokens is padded by one under TP2.
ONE_EXCLUSIVE = replace(MMDIT, exclusive_attention=True, dual_attention_layers=[], text_length=5)
RUN = configuration(ONE_EXCLUSIVE, recurrent=True)
GATED = configuration(MMDIT, recurrent=True, recurrence=replace(RECURRENT, gate_inputs=["unmodulated_tokens", "conditioning"]))  # fmt: skip


def test_layouts_train_as_one_process(tmp_path: Path) -> None:
    expected = run_on_ranks(1, {"exclusive": RUN, "gated": GATED}, tmp_path)
    selective = replace(RUN.training, recompute=Recompute.selective)
    recomputed = {
        name: replace(config, training=selective) for name, config in (("exclusive", RUN), ("gated", GATED))
    }
    layouts = {
        "exclusive TP2": replace(RUN, parallel=layout(tp=2, ep=2)),
        "exclusive PP2": replace(RUN, parallel=layout(pp=2)),
        "gated TP2": replace(GATED, parallel=layout(tp=2)),
        "gated CP2": replace(GATED, parallel=layout(cp=2, ep=2)),
    }
    for name, result in run_on_ranks(1, recomputed, tmp_path).items():
        assert_same_run(result, expected[name], what=name)
    for name, result in run_on_ranks(2, layouts, tmp_path, partial(train, resumes=True)).items():
        assert_same_run(result, expected[name.split()[0]], what=name)
