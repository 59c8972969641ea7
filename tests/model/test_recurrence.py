"""The Megatron-Core recurrence against the float64 reference, and the gate against its closed form."""

from dataclasses import replace

import pytest
import torch

from rmoe_megatron.config.model import RecurrenceConfig
from rmoe_megatron.counter_rng import Purpose, derive, gumbel, sample_keys
from rmoe_megatron.model.reference import ReferenceSettings, recurrent_joint_attention
from tests.support.configurations import (
    HEADS,
    HIDDEN,
    MODEL,
    RECURRENCE,
    TEXT_LENGTH,
    one_rank,
    randomise,
    tiny_config,
)

BATCH, VISION = 3, 16
TOLERANCE = 1e-5


def build_block(recurrence: RecurrenceConfig, qk_norm: bool, layer: int, exclusive: bool = False):  # type: ignore[no-untyped-def]
    from megatron.core.transformer.spec_utils import build_module

    from rmoe_megatron.model.block_specs import block_spec
    from rmoe_megatron.model.mmdit.block import joint_block
    from rmoe_megatron.model.transformer_config import transformer_config

    config = tiny_config(recurrence, model=replace(MODEL, qk_norm=qk_norm, exclusive_attention=exclusive))
    block = build_module(
        block_spec(config, joint_block, layer), config=transformer_config(config), layer_number=layer + 1
    )
    randomise(block)
    return block


def reference_weights(block: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The block's weights under diffusers' names, as float64 leaves."""
    from rmoe_megatron.conversion.weight_names import to_diffusers

    named = {f"transformer.layers.0.{name}": value for name, value in block.state_dict().items()}
    prefix = "transformer_blocks.0.attn."
    renamed = to_diffusers(named, MODEL)
    return {
        name.removeprefix(prefix): value.detach().double().clone().requires_grad_()
        for name, value in renamed.items()
        if name.startswith(prefix)
    }


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-12)
    assert error < TOLERANCE, f"{what} differs by {error:.2e}"


CASES = [
    pytest.param(dict(num_modules=m, steps=t), {}, id=f"M{m}-T{t}") for m in (1, 2, 5) for t in (1, 2, 5)
] + [
    pytest.param(dict(rank=None), {}, id="full-rank"),
    pytest.param(dict(modulation=False), {}, id="no-modulation"),
    pytest.param(dict(gate_inputs=["tokens"]), {}, id="gate-tokens"),
    pytest.param(dict(gate_inputs=["conditioning"]), {}, id="gate-conditioning"),
    pytest.param(
        dict(gate_inputs=["unmodulated_tokens", "conditioning"], steps=3), {}, id="gate-unmodulated"
    ),
    pytest.param({}, dict(qk_norm=False), id="no-qk-norm"),
    pytest.param({}, dict(exclusive=True), id="exclusive"),
    pytest.param(dict(steps=3), dict(exclusive=True, context_pre_only=True), id="exclusive-last-block"),
    pytest.param({}, dict(context_pre_only=True), id="last-block"),
    pytest.param({}, dict(training=False), id="evaluation"),
]


@pytest.mark.parametrize(("changes", "switches"), CASES)
def test_outputs_and_gradients_equal_the_reference(changes: dict, switches: dict) -> None:
    recurrence = replace(RECURRENCE, aux_loss_coeff=0.0, **changes)
    qk_norm, training = switches.get("qk_norm", True), switches.get("training", True)
    last, exclusive = switches.get("context_pre_only", False), switches.get("exclusive", False)
    layer = 2 if last else 1
    generator = torch.Generator().manual_seed(1)
    vision, text = (
        torch.randn(BATCH, length, HIDDEN, generator=generator) for length in (VISION, TEXT_LENGTH)
    )
    conditioning = torch.randn(BATCH, HIDDEN, generator=generator)
    unmodulated = torch.randn(BATCH, VISION, HIDDEN, generator=generator)
    keys = sample_keys(7, torch.arange(BATCH))
    with one_rank(tiny_config()):
        block = build_block(recurrence, qk_norm, layer, exclusive).train(training)
        inputs = [tensor.transpose(0, 1).contiguous().requires_grad_() for tensor in (vision, text)]
        inputs.append(conditioning.unsqueeze(0).clone().requires_grad_())
        raw = unmodulated.transpose(0, 1).contiguous()
        outputs = block.recurrence(block.attention, *inputs, keys, unmodulated=raw)
        directions = [torch.randn(BATCH, VISION, HIDDEN, generator=generator)]
        directions.append(torch.randn(BATCH, TEXT_LENGTH, HIDDEN, generator=generator))
        products = [
            (output * direction.transpose(0, 1)).sum()
            for output, direction in zip(outputs, directions, strict=True)
            if output is not None
        ]
        sum(products).backward()
        weights = reference_weights(block)
        gradients = reference_gradients(block)

    noise = None
    if training:
        noise = [
            gumbel(derive(keys, Purpose.gumbel, layer + 1, step), VISION * recurrence.num_modules)
            .view(BATCH, VISION, recurrence.num_modules)
            .double()
            for step in range(recurrence.steps)
        ]
    settings = ReferenceSettings(
        HEADS, recurrence.num_modules, recurrence.steps, recurrence.rank, recurrence.tau, qk_norm,
        recurrence.modulation, tuple(recurrence.gate_inputs), last, exclusive,
    )  # fmt: skip
    leaves = [tensor.double().requires_grad_() for tensor in (vision, text, conditioning)]
    expected = recurrent_joint_attention(settings, weights, *leaves, noise, unmodulated.double())
    products = [
        (output * direction.double()).sum()
        for output, direction in zip(expected, directions, strict=True)
        if output is not None
    ]
    sum(products).backward()

    assert_close(outputs[0].transpose(0, 1), expected[0], "vision output")
    assert (outputs[1] is None) == last
    if outputs[1] is not None:
        assert_close(outputs[1].transpose(0, 1), expected[1], "text output")
    for name, mine, leaf in zip(("vision", "text"), inputs[:2], leaves[:2], strict=True):
        assert_close(mine.grad.transpose(0, 1), leaf.grad, f"gradient of {name}")
    if recurrence.modulation or "conditioning" in recurrence.gate_inputs:
        assert_close(inputs[2].grad.squeeze(0), leaves[2].grad, "gradient of conditioning")
    for name, leaf in weights.items():
        if leaf.grad is None or leaf.grad.norm() < 1e-9:
            assert gradients[name] is None or gradients[name].norm() < 1e-5, name
        else:
            assert_close(gradients[name], leaf.grad, f"gradient of {name}")


def reference_gradients(block: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """The block's gradients under diffusers' names."""
    from rmoe_megatron.conversion.weight_names import to_diffusers

    named = {
        f"transformer.layers.0.{name}": torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in block.named_parameters()
    }
    renamed = to_diffusers(named, MODEL)
    return {name.removeprefix("transformer_blocks.0.attn."): value for name, value in renamed.items()}


@pytest.mark.parametrize("num_modules", [1, 2, 5])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_up_equals_the_base_model_bit_for_bit(num_modules: int, steps: int, precision: str) -> None:
    from rmoe_megatron.config.run import Precision
    from rmoe_megatron.model.mmdit.transformer import MMDiT

    recurrence = replace(RECURRENCE, num_modules=num_modules, steps=steps)
    config = tiny_config(recurrence, precision=Precision[precision])
    generator = torch.Generator().manual_seed(3)
    inputs = (
        torch.randn(2, 3, 8, 8, generator=generator),
        torch.tensor([10.0, 900.0]),
        torch.arange(2),
        torch.randn(2, TEXT_LENGTH, 12, generator=generator),
        torch.randn(2, 10, generator=generator),
    )
    with one_rank(config):
        recurrent, base = MMDiT(config), MMDiT(replace(config, recurrence=None))
        randomise(recurrent)
        for name, parameter in recurrent.named_parameters():
            if name.endswith("experts.up"):
                parameter.data.zero_()
        shared = {name: value for name, value in recurrent.state_dict().items() if ".recurrence." not in name}
        base.load_state_dict(shared)
        assert torch.equal(recurrent(*inputs), base(*inputs))


def test_straight_through_gradient_equals_autograd_of_the_closed_form() -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from rmoe_megatron.model.recurrence.gate import Gate
    from rmoe_megatron.model.transformer_config import transformer_config

    config = tiny_config(replace(RECURRENCE, aux_loss_coeff=0.0))
    generator = torch.Generator().manual_seed(5)
    state = torch.randn(6, 2, HIDDEN, generator=generator, requires_grad=True)
    conditioning = torch.randn(1, 2, HIDDEN, generator=generator, requires_grad=True)
    keys = sample_keys(0, torch.arange(2))
    values = torch.randn(12, 4, generator=generator)
    with one_rank(config):
        gate = Gate(
            transformer_config(config), config.recurrence, 1, ProcessGroupCollection.use_mpu_process_groups()
        )
        noise = gate.draw_noise(keys, len(state), 1)[0] if gate.training else None
        weights, routing_map = gate(state, conditioning, noise, 1, keys)
        # Dispatch hands on the weight of the picked module alone.
        (weights.masked_select(routing_map) * values.masked_select(routing_map)).sum().backward()
    noise = gumbel(derive(keys, Purpose.gumbel, 1, 0), 24).view(2, 6, 4).transpose(0, 1).double()
    token = gate.weight.detach().double().requires_grad_()
    z = (
        state.detach().double() @ token.T
        + conditioning.detach().double() @ gate.conditioning_weight.double().T
        + noise
    )
    p = (z / config.recurrence.tau).softmax(-1).flatten(0, 1)
    picked = z.flatten(0, 1).argmax(-1)
    assert torch.equal(routing_map.int().argmax(-1), picked)
    assert torch.equal(weights.detach(), routing_map.float())
    (p[torch.arange(12), picked] * values.double()[torch.arange(12), picked]).sum().backward()
    assert_close(gate.weight.grad, token.grad, "gradient of the gate")


@pytest.mark.parametrize("scale", [1.0, 0.25], ids=["one micro-batch", "one of four"])
def test_the_load_balancing_loss_is_that_of_the_switch_transformer(scale: float) -> None:
    """Value and gradient of ``coefficient * M * sum_m (share of tokens of m) * (mean probability of m)`` (Fedus et al., 2021).

    Probabilities are those of logits without noise; shares are of what was picked with it, and have no gradient.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from rmoe_megatron.engine.router_metrics import begin_step
    from rmoe_megatron.model.recurrence.gate import Gate
    from rmoe_megatron.model.transformer_config import transformer_config

    coefficient, modules = 0.3, 4
    config = tiny_config(replace(RECURRENCE, aux_loss_coeff=coefficient))
    generator = torch.Generator().manual_seed(6)
    state = torch.randn(6, 2, HIDDEN, generator=generator)
    conditioning = torch.randn(1, 2, HIDDEN, generator=generator)
    with one_rank(config):
        gate = Gate(
            transformer_config(config), config.recurrence, 1, ProcessGroupCollection.use_mpu_process_groups()
        )
        randomise(gate, seed=2, std=0.5)
        keys = sample_keys(0, torch.arange(2))
        noise = gate.draw_noise(keys, len(state), 1)[0]
        begin_step(torch.nn.Module(), None)
        MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), scale))
        weights, routing_map = gate(state, conditioning, noise, 1, keys)
        (weights * 0).sum().backward()  # nothing but the loss has a gradient
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
        value = get_moe_metrics_tracker().metrics["load_balancing_loss"].values.sum().item()
    token, given = (
        weight.detach().double().requires_grad_() for weight in (gate.weight, gate.conditioning_weight)
    )
    probability = (state.double() @ token.T + conditioning.double() @ given.T).softmax(-1).flatten(0, 1)
    share = routing_map.double().mean(0)
    assert (share > 0).sum() > 1
    expected = modules * (share * probability.mean(0)).sum()
    assert value == pytest.approx(expected.item(), rel=1e-5)
    (scale * coefficient * expected).backward()
    assert_close(gate.weight.grad, token.grad, "gradient of the token's weight")
    assert_close(gate.conditioning_weight.grad, given.grad, "gradient of the conditioning's weight")


def test_a_module_without_tokens_gets_zero_gradients() -> None:
    recurrence = replace(RECURRENCE, num_modules=5, aux_loss_coeff=0.0, gate_inputs=["conditioning"])
    with one_rank(tiny_config()):
        block = build_block(recurrence, True, 1).eval()
        vision, text = torch.randn(VISION, 1, HIDDEN), torch.randn(TEXT_LENGTH, 1, HIDDEN)
        # One sample and a gate that sees the conditioning alone: all tokens go to one module.
        output, _ = block.recurrence(
            block.attention, vision, text, torch.randn(1, 1, HIDDEN), torch.arange(1)
        )
        output.sum().backward()
    norms = block.recurrence.experts.up.grad.flatten(1).norm(dim=1)
    assert (norms > 0).sum() <= recurrence.steps
    assert (norms == 0).sum() >= 5 - recurrence.steps


@pytest.mark.parametrize("grouped", [False, True], ids=["packed", "grouped"])
@pytest.mark.parametrize("rank", [4, None])
def test_no_tokens_give_no_output_and_zero_gradients(rank: int | None, grouped: bool) -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from rmoe_megatron.model.recurrence.experts import Experts
    from rmoe_megatron.model.transformer_config import transformer_config

    recurrence = replace(RECURRENCE, rank=rank)
    config = tiny_config(recurrence)
    with one_rank(config):
        experts = Experts(
            transformer_config(config), recurrence, ProcessGroupCollection.use_mpu_process_groups()
        )
        randomise(experts)
    tokens, weights = torch.zeros(0, HIDDEN, requires_grad=True), torch.zeros(0, requires_grad=True)
    counts = torch.zeros(recurrence.num_modules, dtype=torch.int64)
    projected = experts._project_grouped(tokens, counts) if grouped else experts(tokens, counts, weights)
    assert projected.shape == (0, 3 * HIDDEN)
    projected.backward(torch.ones(0, 3 * HIDDEN))
    for parameter in experts.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    assert tokens.grad.shape == (0, HIDDEN)
    assert grouped or weights.grad.shape == (0,)
