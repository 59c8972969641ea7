"""Rotary positions in two dimensions against attention in float64 whose queries and keys are turned as complex numbers."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rmoe_megatron.config.run import ParallelConfig, Recompute, RunConfig
from rmoe_megatron.conversion.weight_names import to_diffusers
from rmoe_megatron.errors import UserError
from rmoe_megatron.hf.rotary import grid_rotary, rotate
from rmoe_megatron.model.checks import check_model
from rmoe_megatron.pretrained.architecture import transformer_arguments, transformer_class
from tests.distributed.test_parity import assert_same_run
from tests.support.configurations import HEADS, HIDDEN, MODEL, RECURRENCE, one_rank, randomise, tiny_config
from tests.support.ranks import MMDIT, configuration, layout, run_on_ranks, train

THETA = 100.0
ROTARY = replace(MODEL, rope_theta=THETA)
ON_GRID = replace(ROTARY, text_length=18, text_on_grid=True)  # two tokens more than patches


def turned(heads: Tensor, height: int, width: int) -> Tensor:
    """Multiply pairs of dimensions of heads [B, heads, S, D] by exp(i angle): the first half by rows, the second by columns."""
    dim = heads.shape[-1]
    frequencies = torch.tensor([THETA ** (-2 * pair / (dim / 2)) for pair in range(dim // 4)]).double()
    places = [(row, column) for row in range(height) for column in range(width)]
    angles = torch.stack([torch.cat([place[0] * frequencies, place[1] * frequencies]) for place in places])
    pairs = torch.view_as_complex(heads.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(-2)


def test_angles_are_those_of_the_definition() -> None:
    heads = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    ours = rotate(heads, grid_rotary(2, 3, 8, THETA, heads.device))
    torch.testing.assert_close(ours.double(), turned(heads, 2, 3), rtol=1e-5, atol=1e-6)


def test_scores_depend_on_how_far_tokens_are_apart_and_on_nothing_else() -> None:
    query, key = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    table = grid_rotary(4, 5, 16, THETA, query.device)
    queries, keys = (rotate(each.expand(1, 1, 20, 16), table)[0, 0] for each in (query, key))
    scores = (queries @ keys.T).view(4, 5, 4, 5)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[2, 2, 3, 4])
    torch.testing.assert_close(scores[3, 1, 2, 4], scores[1, 0, 0, 3])
    assert abs(scores[0, 0, 1, 2] - scores[0, 0, 2, 1]) > 1e-3


def attention_in_float64(
    weights: dict[str, Tensor], vision: Tensor, text: Tensor, on_grid: bool
) -> tuple[Tensor, Tensor]:
    """Joint attention of vision [B, 16, H] (4 x 4 patches) and text [B, L, H]; weights have diffusers' names below ``attn.``."""

    def linear(name: str, tokens: Tensor) -> Tensor:
        return tokens @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def heads(name: str, tokens: Tensor, norm: str | None = None, grid: bool = False) -> Tensor:
        split = linear(name, tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        if norm is not None:
            split = split / (split.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{norm}.weight"]
        return torch.cat((turned(split[:, :, :16], 4, 4), split[:, :, 16:]), 2) if grid else split

    query = torch.cat(
        [heads("to_q", vision, "norm_q", True), heads("add_q_proj", text, "norm_added_q", on_grid)], 2
    )
    key = torch.cat(
        [heads("to_k", vision, "norm_k", True), heads("add_k_proj", text, "norm_added_k", on_grid)], 2
    )
    value = torch.cat([heads("to_v", vision), heads("add_v_proj", text)], 2)
    scores = query @ key.transpose(-1, -2) / (HIDDEN // HEADS) ** 0.5
    attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return linear("to_out.0", attended[:, :16]), linear("to_add_out", attended[:, 16:])


@pytest.mark.parametrize("model", [ROTARY, ON_GRID], ids=["text-at-the-origin", "text-on-grid"])
def test_joint_attention_and_its_gradients_equal_the_reference(model) -> None:  # type: ignore[no-untyped-def]
    from rmoe_megatron.model.mmdit.transformer import MMDiT

    config = tiny_config(None, model=model)
    generator = torch.Generator().manual_seed(1)
    vision, text = (torch.randn(3, length, HIDDEN, generator=generator) for length in (16, model.text_length))
    with one_rank(config):
        transformer = MMDiT(config)
        randomise(transformer)
        attention = transformer.transformer.layers[0].attention
        positions = transformer.positions(torch.zeros(3, 3, 8, 8))
        inputs = [each.transpose(0, 1).contiguous().requires_grad_() for each in (vision, text)]
        text_qkv = attention.project_text(inputs[1], positions)
        outputs = attention(attention.project_vision(inputs[0]), text_qkv, positions)
        outputs = [output.transpose(0, 1) for output in outputs]
        prefix = "transformer_blocks.0.attn."
        weights = {
            name.removeprefix(prefix): value.double()
            for name, value in to_diffusers(transformer.state_dict(), model).items()
            if name.startswith(prefix)
        }
    leaves = [each.double().requires_grad_() for each in (vision, text)]
    expected = attention_in_float64(weights, *leaves, model.text_on_grid)
    directions = [torch.randn(output.shape, generator=generator) for output in outputs]
    sum((output * each).sum() for output, each in zip(outputs, directions, strict=True)).backward()
    sum((output * each.double()).sum() for output, each in zip(expected, directions, strict=True)).backward()
    for ours, theirs in [
        *zip(outputs, expected, strict=True),
        *((mine.grad.transpose(0, 1), leaf.grad) for mine, leaf in zip(inputs, leaves, strict=True)),
    ]:
        assert (ours.double() - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize(
    "model", [ROTARY, ON_GRID, replace(ROTARY, qk_norm=False)], ids=["plain", "on-grid", "no-norm"]
)
@pytest.mark.parametrize("recurrence", [None, RECURRENCE], ids=["dense", "recurrent"])
def test_exported_transformer_equals_the_training_model(model, recurrence) -> None:  # type: ignore[no-untyped-def]
    from rmoe_megatron.model.mmdit.transformer import MMDiT

    config = tiny_config(recurrence, model=model)
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 3, 8, 6, generator=generator)  # not the model's square
    timestep = torch.tensor([15.0, 870.0])
    text, pooled = (
        torch.randn(2, model.text_length, 12, generator=generator),
        torch.randn(2, 10, generator=generator),
    )
    with one_rank(config), torch.no_grad():
        ours = MMDiT(config).eval()
        randomise(ours)
        expected = ours(latents, timestep, torch.arange(2), text, pooled)
        theirs = transformer_class(config)(**transformer_arguments(config)).eval()
        theirs.load_state_dict(to_diffusers(ours.state_dict(), config.model))
        actual = theirs(
            latents, encoder_hidden_states=text, pooled_projections=pooled, timestep=timestep
        ).sample
        # The positions are seen.
        unturned = MMDiT(replace(config, model=replace(model, rope_theta=None, text_on_grid=False))).eval()
        unturned.load_state_dict(ours.state_dict())
        other = unturned(latents, timestep, torch.arange(2), text, pooled)
    assert (actual - expected).norm() / expected.norm() < 1e-5
    assert (other - expected).norm() / expected.norm() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(dual_attention_layers=[0]), "second attention"),
        (dict(num_attention_heads=16), "multiple of 4"),
        (dict(text_on_grid=True), "text_length 5"),
        (dict(rope_theta=None, text_on_grid=True, text_length=16), "rope_theta is None"),
        (dict(rope_theta=0.5), "rope_theta"),
    ],
)
def test_what_is_not_proved_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_model(tiny_config(None, model=replace(ROTARY, **changes)))


RUN = configuration(replace(MMDIT, rope_theta=THETA, dual_attention_layers=[]), recurrent=True)
GRID_RUN = configuration(
    replace(MMDIT, rope_theta=THETA, dual_attention_layers=[], text_length=18, text_on_grid=True),
    recurrent=False,
)


def spread(config: RunConfig, parallel: ParallelConfig, recompute: Recompute = Recompute.none) -> RunConfig:
    return replace(config, parallel=parallel, training=replace(config.training, recompute=recompute))


def test_layouts_train_as_one_process(tmp_path: Path) -> None:
    """Text of six tokens is padded nowhere here; that on the grid has one for each patch of the square."""
    expected = run_on_ranks(1, {"rotary": RUN, "grid": GRID_RUN}, tmp_path)
    recomputed = {
        "rotary": spread(RUN, layout(), Recompute.selective),
        "grid": spread(GRID_RUN, layout(), Recompute.full),
    }
    layouts = {
        "rotary TP2": spread(RUN, layout(tp=2, ep=2)),
        "rotary CP2": spread(RUN, layout(cp=2)),
        "grid TP2": spread(GRID_RUN, layout(tp=2)),
        "grid CP2": spread(GRID_RUN, layout(cp=2)),
        "grid PP2": spread(GRID_RUN, layout(pp=2)),
    }
    for name, result in run_on_ranks(1, recomputed, tmp_path).items():
        assert_same_run(result, expected[name], what=name)
    for name, result in run_on_ranks(2, layouts, tmp_path, partial(train, resumes=True)).items():
        assert_same_run(result, expected[name.split()[0]], what=name)
