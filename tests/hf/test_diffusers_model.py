"""The diffusers side: equal to the training model, to diffusers' own classes, and free of Megatron-Core."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import BertConfig, BertModel, BertTokenizerFast

from rmoe_megatron.config.model import DiffusionConfig, Prediction, RecurrenceConfig
from rmoe_megatron.conversion.weight_names import to_diffusers
from rmoe_megatron.errors import UserError
from rmoe_megatron.hf import RecurrentSD3Pipeline
from rmoe_megatron.hf.pixel_codec import PixelCodec
from rmoe_megatron.pretrained.architecture import transformer_arguments, transformer_class
from tests.support.configurations import MODEL, RECURRENCE, TEXT_LENGTH, one_rank, randomise, tiny_config
from tests.support.diffusers_models import run_ours


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(2, 3, 8, 8, generator=generator),
        "timestep": torch.tensor([15.0, 870.0]),
        "encoder_hidden_states": torch.randn(2, TEXT_LENGTH, 12, generator=generator),
        "pooled_projections": torch.randn(2, 10, generator=generator),
    }


@pytest.mark.parametrize(
    "recurrence",
    [
        None,
        RECURRENCE,
        replace(RECURRENCE, steps=5, num_modules=5),
        replace(RECURRENCE, steps=1, num_modules=1),
        replace(RECURRENCE, rank=None),
        replace(RECURRENCE, modulation=False, gate_inputs=["tokens"]),
    ],
    ids=["dense", "recurrent", "M5-T5", "M1-T1", "full-rank", "ablated"],
)
@pytest.mark.parametrize(("qk_norm", "prediction"), [(True, "velocity"), (False, "sample")])
def test_exported_transformer_equals_the_training_model(
    recurrence: RecurrenceConfig | None, qk_norm: bool, prediction: str
) -> None:
    from rmoe_megatron.model.mmdit.transformer import MMDiT

    diffusion = DiffusionConfig(prediction=Prediction[prediction])
    config = tiny_config(recurrence, model=replace(MODEL, qk_norm=qk_norm), diffusion=diffusion)
    batch = inputs()
    with one_rank(config), torch.no_grad():
        model = MMDiT(config).eval()
        randomise(model)
        expected = run_ours(model, batch)
        theirs = transformer_class(config)(**transformer_arguments(config)).eval()
        theirs.load_state_dict(to_diffusers(model.state_dict(), config.model))
        actual = theirs(**batch).sample
    assert (actual - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("length", [TEXT_LENGTH - 1, TEXT_LENGTH + 2])
def test_text_of_another_length_is_refused(length: int) -> None:
    """Blocks split text from vision at model.text_length."""
    from rmoe_megatron.model.mmdit.transformer import MMDiT

    config, batch = tiny_config(), inputs()
    batch["encoder_hidden_states"] = torch.zeros(2, length, 12)
    with one_rank(config), torch.no_grad():
        model = MMDiT(config)
        with pytest.raises(
            UserError, match=f"text has {length} tokens but model.text_length is {TEXT_LENGTH}"
        ):
            run_ours(model, batch)


def tiny_pipeline(folder: Path) -> RecurrentSD3Pipeline:
    """A pipeline with random weights and a tiny text encoder."""
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "two", "red", "circles"])
    )
    encoder = BertModel(
        BertConfig(
            vocab_size=9, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    )
    config = tiny_config(model=replace(MODEL, pooled_size=12))
    transformer = transformer_class(config)(**transformer_arguments(config))
    randomise(transformer)
    return RecurrentSD3Pipeline(
        transformer.eval(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        PixelCodec(),
        encoder.eval(),
        BertTokenizerFast(str(vocabulary)),
        TEXT_LENGTH,
    )


def test_pipeline_folder_round_trip_without_megatron(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tmp_path)
    pipeline.save_pretrained(tmp_path / "model")
    expected = pipeline(
        "two red circles", generator=torch.Generator().manual_seed(1), num_inference_steps=3, output_type="np"
    )
    torch.save(torch.from_numpy(expected.images), tmp_path / "expected.pt")
    script = f"""
import sys, torch
from rmoe_megatron.hf import RecurrentSD3Pipeline
pipeline = RecurrentSD3Pipeline.from_pretrained({str(tmp_path / "model")!r})
images = pipeline("two red circles", generator=torch.Generator().manual_seed(1), num_inference_steps=3,
                  output_type="np").images
expected = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=True)
assert torch.allclose(torch.from_numpy(images), expected, atol=1e-6), "images differ"
assert not any(name.split(".")[0] == "megatron" for name in sys.modules), "megatron was imported"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_images_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    from rmoe_megatron.inference.sampling import sample_images

    pipeline = tiny_pipeline(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    prompts, seeds = ["two red circles", "a", "red", "a red circles"], [5, 6, 7, 8]
    together = sample_images(pipeline, prompts, seeds, steps=3, guidance=2.0, batch_size=4)
    alone = sample_images(pipeline, prompts, seeds, steps=3, guidance=2.0, batch_size=1)
    assert abs(together.astype(int) - alone.astype(int)).max() <= 1
    assert (together[0] != together[1]).any()


def test_gradient_checkpointing_and_compiled_blocks_change_nothing() -> None:
    """What diffusers offers by class attributes holds for recurrent blocks, too."""
    config = tiny_config()
    model = transformer_class(config)(**transformer_arguments(config)).train()
    randomise(model)

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        output = model(**inputs()).sample
        output.square().sum().backward()
        return [output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = run()
    model.enable_gradient_checkpointing()
    for ours, theirs in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    model.disable_gradient_checkpointing()
    model.compile_repeated_blocks(backend="eager")
    compiled = [block for block in model.transformer_blocks if block._compiled_call_impl is not None]
    assert len(compiled) == len(model.transformer_blocks)
    for ours, theirs in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
