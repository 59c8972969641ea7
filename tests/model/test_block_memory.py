"""What a block keeps for its backward pass, beside diffusers' block of the same size."""

from dataclasses import replace

import torch
from diffusers.models.attention import JointTransformerBlock
from tensor_memory import peak_tensor_bytes

from rmoe_megatron.model.build import build_transformer
from tests.support.configurations import MODEL, one_rank, tiny_config

HIDDEN, VISION, TEXT = 64, 512, 16
CPU = torch.device("cpu")


def test_the_peak_is_counted() -> None:
    def action() -> None:
        kept = torch.ones(1000)
        torch.ones(2000)  # released at once
        torch.ones(500).add_(kept[:500])

    assert peak_tensor_bytes(action, CPU) == 4 * 3000


def test_a_block_takes_no_more_than_diffusers() -> None:
    model = replace(
        MODEL, hidden_size=HIDDEN, num_attention_heads=4, num_layers=2, text_length=TEXT, qk_norm=False
    )
    config = tiny_config(None, model=model)
    with one_rank(config):
        ours = build_transformer(config).transformer.layers[0]
        theirs = JointTransformerBlock(HIDDEN, 4, HIDDEN // 4)

        def run_ours() -> None:
            tokens = torch.randn(TEXT + VISION, 1, HIDDEN, requires_grad=True)
            conditioning = torch.randn(1, 1, HIDDEN, requires_grad=True)
            output, _ = ours(tokens, context=conditioning, context_mask=torch.zeros(1, dtype=torch.int64))
            output.sum().backward()

        def run_theirs() -> None:
            vision, text = (torch.randn(1, length, HIDDEN, requires_grad=True) for length in (VISION, TEXT))
            outputs = theirs(vision, text, torch.randn(1, HIDDEN, requires_grad=True))
            sum(output.sum() for output in outputs).backward()

        mine, other = peak_tensor_bytes(run_ours, CPU), peak_tensor_bytes(run_theirs, CPU)
        assert 12 * VISION * HIDDEN * 4 < mine <= other
