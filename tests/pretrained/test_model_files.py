"""Which files are a model's: what diffusers and transformers load, what is downloaded of a repository, and what is hashed."""

import json
import shutil
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

from rmoe_megatron.config.model import EncodersConfig, ModelDescription
from rmoe_megatron.encoders.autoencoder import load_autoencoder
from rmoe_megatron.encoders.fingerprint import describe_autoencoder, describe_text_encoder
from rmoe_megatron.encoders.text import load_text_encoder
from rmoe_megatron.errors import UserError
from rmoe_megatron.pretrained import hub
from rmoe_megatron.pretrained.hub import model_folder, present_folder
from rmoe_megatron.pretrained.loading import load_text_encoder_folder
from rmoe_megatron.pretrained.model_files import (
    DIFFUSERS_WEIGHTS,
    TRANSFORMERS_WEIGHTS,
    Weights,
    autoencoder_parts,
    choose_weights,
    copy_part,
    judge_parts,
    needed_files,
    pipeline_parts,
    text_encoder_parts,
    transformer_parts,
    weights_in,
)
from rmoe_megatron.pretrained.safetensors_folder import SafetensorsFolder
from tests.support.sd3_pipeline import T5_WIDTH, TEXT_LENGTH, clip, make_pipeline

CPU = torch.device("cpu")
D, M = DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS
STEM = D.removesuffix(".safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``plain``, ``fp16`` and ``split`` hold one pipeline: as it is, as a variant, and as a variant in several files."""
    root = tmp_path_factory.mktemp("pipelines")
    pipeline = make_pipeline()
    pipeline.save_pretrained(root / "plain")
    pipeline.save_pretrained(root / "fp16", variant="fp16")
    pipeline.save_pretrained(root / "split", variant="fp16", max_shard_size="20KB")
    return root


@pytest.mark.parametrize(
    ("names", "single", "expected"),
    [
        ({M, "model.fp16.safetensors", "pytorch_model.bin", "other.safetensors"}, M, Weights((M,))),
        ({f"{STEM}.fp16.safetensors", "config.json"}, D, Weights((f"{STEM}.fp16.safetensors",), None, "fp16")),
        (
            {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", f"{M}.index.json",
             "model.fp16-00001-of-00002.safetensors", f"{M}.index.fp16.json"},
            M,
            Weights(("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), f"{M}.index.json"),
        ),
        (
            {"model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors", f"{M}.index.fp16.json"},
            M,
            Weights(("model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"),
                    f"{M}.index.fp16.json", "fp16"),
        ),
        (
            {f"{STEM}-00001-of-00001.bf16.safetensors", f"{D}.index.bf16.json"},  # as older versions of diffusers wrote them
            D,
            Weights((f"{STEM}-00001-of-00001.bf16.safetensors",), f"{D}.index.bf16.json", "bf16"),
        ),
    ],
)  # fmt: skip
def test_the_weights_of_a_folder(names: set[str], single: str, expected: Weights) -> None:
    assert choose_weights(names, single, "X") == expected


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (
            {"model.fp16.safetensors", "model.bf16.safetensors"},
            "the variants bf16 and fp16 of model.safetensors",
        ),
        ({"pytorch_model.bin", "config.json"}, "pytorch_model.bin is a pickle, which could run code"),
        ({"sd3.5_medium.safetensors"}, "sd3.5_medium.safetensors has another name"),
        ({"model.onnx"}, r"There is no model.safetensors \(or its index\) in X; download"),
        (set(), "There is no model.safetensors"),
    ],
)
def test_a_folder_without_weights_is_told(names: set[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        choose_weights(names, M, "X")


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_where_there_are_both_the_library_s_choice_counts(library: str, tmp_path: Path) -> None:
    """One file and several of other values: what is chosen is what ``from_pretrained`` loads."""
    is_diffusers = library == "diffusers"
    model = make_pipeline().transformer if is_diffusers else clip(16, 12, seed=1)
    single = D if is_diffusers else M
    name = next(iter(model.state_dict()))
    for values, arguments in ((1.0, {}), (2.0, {"max_shard_size": "20KB"})):
        with torch.no_grad():
            model.state_dict()[name].fill_(values)
        model.save_pretrained(tmp_path / str(values), **arguments)
    shutil.copytree(tmp_path / "1.0", tmp_path / "both")
    shutil.copytree(tmp_path / "2.0", tmp_path / "both", dirs_exist_ok=True)
    shutil.copy(tmp_path / "1.0" / single, tmp_path / "both" / single)
    cls: Any = SD3Transformer2DModel if is_diffusers else CLIPTextModelWithProjection
    loaded = cls.from_pretrained(tmp_path / "both").state_dict()[name].flatten()[0].item()
    files = weights_in(tmp_path / "both", single).files
    chosen = next(
        tensors[name].flatten()[0].item()
        for tensors in (load_file(tmp_path / "both" / file) for file in files)
        if name in tensors
    )
    assert chosen == loaded


@pytest.mark.parametrize("name", ["fp16", "split"])
def test_a_variant_alone_is_loaded_wherever_the_plain_weights_are(name: str, folder: Path) -> None:
    encoders = [
        load_text_encoder(EncodersConfig(text_encoder=str(folder / each)), TEXT_LENGTH, CPU).encode(["a cat"])
        for each in ("plain", name)
    ]
    assert torch.equal(encoders[0].hidden_states, encoders[1].hidden_states)
    one, other = (load_autoencoder(str(folder / each), CPU).state_dict() for each in ("plain", name))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    one_source, other_source = (SafetensorsFolder(folder / each / "transformer") for each in ("plain", name))
    assert one_source.shapes == other_source.shapes
    assert other_source.variant == "fp16"


def test_an_index_that_names_a_missing_file_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "split" / "text_encoder_3", tmp_path / "t5")
    next((tmp_path / "t5").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="which is not there"):
        load_text_encoder_folder(tmp_path / "t5", CLIPTextModelWithProjection, None)


def test_a_copy_has_the_model_s_files_alone(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder / "split" / "text_encoder_3", source)
    (tmp_path / "secret").write_text("secret")
    (source / "notes").symlink_to(tmp_path / "secret")
    (source / "model.onnx").write_text("of another tool")
    copy_part(source, tmp_path / "copy", M)
    assert not {"notes", "model.onnx"} & {path.name for path in (tmp_path / "copy").iterdir()}
    assert weights_in(tmp_path / "copy", M).variant is None  # diffusers finds them without being told
    one, other = SafetensorsFolder(source, M), SafetensorsFolder(tmp_path / "copy", M)
    assert one.shapes == other.shapes
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.shapes)
    (source / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="link out of its folder"):
        copy_part(source, tmp_path / "again", M)


# As in the repository of Stable Diffusion 3.5, with variants and other tools' files.
REPOSITORY = [
    "README.md",
    "model_index.json",
    "sd3.5_medium.safetensors",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder_2/config.json",
    "text_encoder_2/model.safetensors",
    "text_encoder_2/model.fp16.safetensors",
    "text_encoder_3/config.json",
    "text_encoder_3/model-00001-of-00002.safetensors",
    "text_encoder_3/model-00002-of-00002.safetensors",
    "text_encoder_3/model.fp16-00001-of-00002.safetensors",
    "text_encoder_3/model.fp16-00002-of-00002.safetensors",
    "text_encoder_3/model.safetensors.index.json",
    "text_encoder_3/model.safetensors.index.fp16.json",
    "text_encoders/clip_g.safetensors",
    "text_encoders/t5xxl_fp16.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "tokenizer_2/merges.txt",
    "tokenizer_2/vocab.json",
    "tokenizer_3/spiece.model",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.bin",
    "vae_decoder/model.onnx",
]
VAE = ["vae/diffusion_pytorch_model.safetensors"]
TRANSFORMER = ["transformer/diffusion_pytorch_model.safetensors"]
CLIPS = ["text_encoder/model.safetensors", "text_encoder_2/model.safetensors"]
T5 = ["text_encoder_3/model-00001-of-00002.safetensors", "text_encoder_3/model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("choice", "weights"),
    [
        (autoencoder_parts, VAE),
        (text_encoder_parts, [*CLIPS, *T5]),
        (partial(text_encoder_parts, dropped=["t5"]), CLIPS),
        (transformer_parts, TRANSFORMER),
        (pipeline_parts, [*TRANSFORMER, *VAE, *CLIPS, *T5]),
    ],
)
def test_of_a_repository_what_is_needed_is_downloaded(
    choice: Any, weights: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(name: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        if local_files_only:
            raise FileNotFoundError
        asked[:] = [file for file in REPOSITORY if any(fnmatch(file, each) for each in allow_patterns)]
        return "somewhere"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name: REPOSITORY)
    assert model_folder("owner/name", choice) == Path("somewhere")
    assert [file for file in asked if file.endswith((".safetensors", ".bin", ".onnx"))] == [
        file for file in REPOSITORY if file in weights
    ]
    configs = {
        "text_encoder": "tokenizer/vocab.json",
        "vae": "vae/config.json",
        "transformer": "scheduler/scheduler_config.json",
    }
    assert [
        part
        for part, file in configs.items()
        if file in asked and any(each.startswith(part) for each in weights)
    ]

    def unreachable(name: str) -> list[str]:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.list_repo_files", unreachable)  # by patterns: variants come along
    model_folder("owner/name", choice)
    assert set(weights) <= set(asked)
    assert not [
        file
        for file in asked
        if file.startswith(("text_encoders/", "sd3.5", "vae_decoder/")) or file.endswith(".bin")
    ]


def test_a_judge_and_a_text_encoder_lie_in_the_root() -> None:
    names = ["config.json", "model.safetensors", "onnx/model.onnx", "pytorch_model.bin", "tokenizer.json", "vocab.txt",
             "1_Pooling/config.json", "README.md"]  # fmt: skip
    for choice in (judge_parts, text_encoder_parts):
        needed = needed_files(names, choice(names), "X")
        assert needed == ["config.json", "model.safetensors", "tokenizer.json", "vocab.txt"]


@pytest.fixture
def cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with ``owner/sd3``, laid out as the hub's library does: links to blobs. There is no network."""
    repository = tmp_path / "hub" / "models--owner--sd3"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(path for path in (folder / "plain").rglob("*") if path.is_file())):
        link = repository / "snapshots" / "0123" / path.relative_to(folder / "plain")
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, repository / "blobs" / f"{number:040x}")
        link.symlink_to(
            Path(*[".."] * (len(link.relative_to(repository).parts) - 1)) / "blobs" / f"{number:040x}"
        )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository / "snapshots" / "0123"


def test_a_cached_repository_stands_wherever_a_folder_does(cache: Path, folder: Path, tmp_path: Path) -> None:
    from rmoe_megatron.config.run import ParallelConfig
    from rmoe_megatron.conversion.importing import import_diffusers
    from rmoe_megatron.inference.sampling import load_pipeline

    assert load_autoencoder("owner/sd3", CPU).config.latent_channels == 4
    assert load_text_encoder(EncodersConfig(text_encoder="owner/sd3"), TEXT_LENGTH, CPU).encode(["a"])
    assert type(load_pipeline(Path("owner/sd3"))) is StableDiffusion3Pipeline
    import_diffusers(Path("owner/sd3"), tmp_path / "run", TEXT_LENGTH, ParallelConfig())
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "text_encoder: owner/sd3" in config
    assert "autoencoder: owner/sd3" in config
    assert present_folder("owner/sd3", "encoders.text_encoder", text_encoder_parts) == cache
    (cache / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model.safetensors .*text_encoder_2.* \(encoders.text_encoder\)"):
        present_folder("owner/sd3", "encoders.text_encoder", text_encoder_parts)
    assert hub.model_folder("owner/sd3", autoencoder_parts) == cache


def described(folder: Path, dropped: tuple[str, ...] = ()) -> tuple[str, str]:
    """The fingerprints of a pipeline's encoders."""
    description = ModelDescription()
    description.encoders = EncodersConfig(text_encoder=str(folder), dropped=list(dropped))
    text = describe_text_encoder(description)["text_encoder_sha256"]
    return describe_autoencoder(str(folder))["autoencoder_sha256"], text


def test_what_is_loaded_is_what_is_hashed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "plain", tmp_path / "more")
    more = tmp_path / "more"
    shutil.copy(more / "vae" / D, more / "sd3.safetensors")  # a single file in the root
    shutil.copy(more / "text_encoder" / M, more / "text_encoder" / "model.fp16.safetensors")
    (more / "text_encoders").mkdir()
    shutil.copy(more / "text_encoder" / M, more / "text_encoders" / "clip_l.safetensors")
    assert described(more) == described(folder / "plain")
    without_t5 = described(more, ("t5",))[1]
    path = more / "text_encoder_3" / M
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    assert described(more)[0] == described(folder / "plain")[0]
    assert described(more)[1] != described(folder / "plain")[1]
    assert described(more, ("t5",))[1] == without_t5  # it is not loaded


@pytest.mark.parametrize("name", ["scaling_factor", "shift_factor"])
def test_latents_of_another_scale_are_those_of_another_autoencoder(
    folder: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(folder / "plain", tmp_path / "other")
    path = tmp_path / "other" / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: 0.5}))
    assert described(tmp_path / "other")[0] != described(folder / "plain")[0]
    assert described(tmp_path / "other")[1] == described(folder / "plain")[1]


def test_a_pipeline_without_t5_takes_its_width_from_the_model(tmp_path: Path) -> None:
    """What diffusers makes of the captions is the same with zeros in T5's place."""
    make_pipeline().save_pretrained(tmp_path / "full")
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "full", text_encoder_3=None, tokenizer_3=None
    )
    pipeline.save_pretrained(tmp_path / "sd3")
    assert json.loads((tmp_path / "sd3" / "model_index.json").read_text())["text_encoder_3"] == [None, None]
    encoders = EncodersConfig(text_encoder=str(tmp_path / "sd3"), dropped=["t5"])
    ours = load_text_encoder(encoders, TEXT_LENGTH, CPU, T5_WIDTH).encode(["a red cat"])
    states, _, pooled, _ = pipeline.encode_prompt(
        "a red cat", None, None, max_sequence_length=TEXT_LENGTH - 77, do_classifier_free_guidance=False
    )
    torch.testing.assert_close(ours.hidden_states, states)
    torch.testing.assert_close(ours.pooled, pooled)
    with pytest.raises(
        UserError, match=r"without text_encoder_3 \(t5\); use it with encoders.dropped=\[t5\]"
    ):
        load_text_encoder(EncodersConfig(text_encoder=str(tmp_path / "sd3")), TEXT_LENGTH, CPU, T5_WIDTH)
