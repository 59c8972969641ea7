"""Folders that others made: whatever is in them, they are loaded or refused with one sentence, and nothing in them runs."""

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizer

from rmoe_megatron.config.model import EncodersConfig
from rmoe_megatron.conversion.facebook_dit import FacebookDiT
from rmoe_megatron.encoders.autoencoder import load_autoencoder
from rmoe_megatron.encoders.conditions import NULL_TEXT, read_null_text
from rmoe_megatron.encoders.text import encode_captions, load_text_encoder
from rmoe_megatron.errors import UserError
from rmoe_megatron.hf import RecurrentSD3Pipeline
from rmoe_megatron.hf.pixel_codec import PixelCodec
from rmoe_megatron.inference.sampling import load_pipeline, sample_images
from rmoe_megatron.pretrained.architecture import read_architecture
from rmoe_megatron.pretrained.safetensors_folder import check_tensors
from tests.conversion.test_import_export import RECURRENCE_SETTINGS, facebook_state
from tests.hf.test_pipelines import recurrent_dit, recurrent_sd3
from tests.support.configurations import randomise, tiny_config
from tests.support.diffusers_models import SD3, make_model
from tests.support.sd3_pipeline import TEXT_LENGTH

PROMPTS = {"own": "a cat", "dit": "3", "sd3": "a cat"}


def save_own(folder: Path) -> None:
    """A recurrent MM-DiT with one tiny text encoder and the pixel codec."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=8)  # fmt: skip
    sizes = SD3 | {
        "joint_attention_dim": 12,
        "pooled_projection_dim": 12,
        "in_channels": 3,
        "out_channels": 3,
    }
    from rmoe_megatron.hf import RecurrentSD3Transformer2DModel

    transformer = RecurrentSD3Transformer2DModel(**sizes, recurrence=RECURRENCE_SETTINGS)
    randomise(transformer, std=0.1)
    RecurrentSD3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=PixelCodec(),
        text_encoder=BertModel(config), tokenizer=BertTokenizer({word: n for n, word in enumerate(words)}),
        text_length=5,
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``own``, ``sd3`` and ``dit``, each with code beside every configuration that would leave a trace."""
    root = tmp_path_factory.mktemp("foreign")
    for name, save in (("own", save_own), ("sd3", recurrent_sd3), ("dit", recurrent_dit)):
        save(root / name)
        for folder in (root / name, *(path for path in (root / name).iterdir() if path.is_dir())):
            (folder / "planted.py").write_text(f"open({str(root / 'executed')!r}, 'w')\n")
    return root


@pytest.fixture
def work(valid: Path, tmp_path: Path) -> Iterator[Path]:
    """Copies to change; what changes is written anew, so the large files may be links."""
    for name in PROMPTS:
        copy_folder(valid / name, tmp_path / name)
    yield tmp_path
    assert not (valid / "executed").exists()


def copy_folder(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=os.link)


def replace_file(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def change(path: Path, **values: Any) -> None:
    replace_file(path, json.dumps(json.loads(path.read_text()) | values).encode())


def draw(folder: Path, prompt: str) -> None:
    """What `rmoe sample` does."""
    images = sample_images(load_pipeline(folder), [prompt], [0], steps=2, guidance=2.0, batch_size=1)
    assert images.shape[0] == 1


def assert_one_sentence(error: UserError) -> None:
    message = str(error)
    assert "\n" not in message
    assert message.endswith("."), message
    assert len(message) < 1200


@pytest.mark.parametrize("name", PROMPTS)
def test_valid_folders_are_sampled(name: str, work: Path) -> None:
    draw(work / name, PROMPTS[name])


@pytest.mark.parametrize(
    "entry",
    [["os", "system"], ["rmoe_megatron.cli", "main"], ["planted", "X"], ["/tmp/library", "X"], ["diffusers", "__builtins__"],
     ["transformers", "pipeline"], ["diffusers", "DiffusionPipeline"], [None, None], ["diffusers"], [1, 2], "x", None, {}],
)  # fmt: skip
@pytest.mark.parametrize("component", ["transformer", "scheduler", "text_encoder", "tokenizer", "another"])
def test_components_are_of_known_classes(component: str, entry: object, work: Path) -> None:
    if component == "another" and entry in ([None, None], "x", None, {}):
        return  # names no class
    index = work / "own" / "model_index.json"
    change(index, **{component: entry})
    with pytest.raises(UserError, match="model_index.json") as raised:
        load_pipeline(work / "own")
    assert_one_sentence(raised.value)


@pytest.mark.parametrize(
    "name", ["__builtins__", "../own", "os.system", "DiffusionPipeline", "", None, 3, {}]
)
def test_pipelines_are_of_known_classes(name: object, work: Path) -> None:
    change(work / "own" / "model_index.json", _class_name=name)
    with pytest.raises(UserError, match="supported are RecurrentSD3Pipeline"):
        load_pipeline(work / "own")


# folder, file, values, what the message says
WRONG_VALUES: list[tuple[str, str, dict[str, Any], str]] = [
    ("own", "model_index.json", {"text_length": 10**9}, "text_length"),
    ("own", "transformer/config.json", {"num_layers": 10**9}, "num_layers 1000000000"),
    ("own", "transformer/config.json", {"num_layers": 200}, "missing transformer_blocks"),
    ("own", "transformer/config.json", {"num_layers": "3"}, 'num_layers "3"'),
    ("own", "transformer/config.json", {"sample_size": [8, 8]}, "sample_size"),
    ("own", "transformer/config.json", {"patch_size": 0}, "patch_size 0"),
    ("own", "transformer/config.json", {"patch_size": 3}, "patch_size"),
    ("own", "transformer/config.json", {"pos_embed_max_size": 2048, "attention_head_dim": 1024, "caption_projection_dim": 2048}, "positions"),
    ("own", "transformer/config.json", {"num_attention_heads": 1024}, "instead of|supported is"),
    ("own", "transformer/config.json", {"recurrence": {"layers": [0]}}, "recurrence"),
    ("own", "transformer/config.json", {"recurrence": RECURRENCE_SETTINGS | {"layers": [7]}}, "block 7"),
    ("own", "transformer/config.json", {"recurrence": RECURRENCE_SETTINGS | {"evil": 1}}, "unknown key"),
    ("own", "transformer/config.json", {"_class_name": "__builtins__"}, "supported are SD3Transformer2DModel"),
    ("own", "transformer/config.json", {"_class_name": ["x"]}, "supported are SD3Transformer2DModel"),
    ("own", "transformer/config.json", {"quantization_config": {"quant_method": "gguf"}}, "quantization_config"),
    ("own", "transformer/config.json", {"auto_map": {"AutoModel": "planted.X"}}, "auto_map"),
    ("dit", "transformer/config.json", {"sample_size": 8192}, "sample_size"),
    ("dit", "transformer/config.json", {"num_embeds_ada_norm": 10**7}, "instead of"),
    ("dit", "transformer/config.json", {"norm_type": []}, "norm_type"),
    ("sd3", "vae/config.json", {"block_out_channels": [8192] * 8}, "parameters"),
    ("sd3", "vae/config.json", {"block_out_channels": [8, 8, 8]}, "vae"),
    ("sd3", "vae/config.json", {"down_block_types": ["os.system"] * 2}, "down_block_types"),
    ("sd3", "vae/config.json", {"scaling_factor": 0}, "scaling_factor"),
    ("sd3", "vae/config.json", {"layers_per_block": 10**6}, "layers_per_block"),
    ("own", "vae/config.json", {"scaling_factor": "x"}, "scaling_factor"),
    ("own", "vae/config.json", {"_class_name": "AutoencoderKL"}, "belongs"),
    ("own", "scheduler/scheduler_config.json", {"shift": None}, "shift null"),
    ("own", "scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps"),
    ("own", "scheduler/scheduler_config.json", {"_class_name": "LMSDiscreteScheduler"}, "supported are"),
    ("dit", "scheduler/scheduler_config.json", {"beta_schedule": "os"}, "beta_schedule"),
    ("dit", "scheduler/scheduler_config.json", {"trained_betas": ["x"]}, "trained_betas"),
    ("dit", "scheduler/scheduler_config.json", {"beta_end": float("inf")}, "beta_end"),
    ("own", "text_encoder/config.json", {"auto_map": {"AutoModel": "planted.X"}}, "auto_map"),
    ("own", "text_encoder/config.json", {"num_hidden_layers": 10**6}, "num_hidden_layers"),
    ("own", "text_encoder/config.json", {"num_hidden_layers": 200}, "parameters"),
    ("own", "text_encoder/config.json", {"hidden_size": 65536}, "text_encoder"),
    ("own", "text_encoder/config.json", {"num_attention_heads": 5}, "text_encoder"),
    ("own", "text_encoder/config.json", {"num_hidden_layers": 3}, "lacks 16 tensors"),
    ("own", "text_encoder/config.json", {"n_layer": 10**6}, "n_layer"),
    ("own", "text_encoder/config.json", {"attn_implementation": "someone/kernel"}, "attn_implementation"),
    ("own", "tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["planted.X", None]}}, "auto_map"),
    ("own", "tokenizer/tokenizer_config.json", {"model_max_length": -1}, "model_max_length"),
    ("own", "tokenizer/tokenizer.json", {"model": 3}, "tokenizer"),
    ("sd3", "text_encoder_3/config.json", {"d_ff": 0}, "d_ff"),
    ("sd3", "text_encoder_2/config.json", {"projection_dim": 3}, "text_encoder_2"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "values", "complaint"), WRONG_VALUES)
def test_wrong_values_are_refused(
    name: str, file: str, values: dict[str, Any], complaint: str, work: Path
) -> None:
    change(work / name / file, **values)
    with pytest.raises(UserError, match=complaint) as raised:
        draw(work / name, PROMPTS[name])
    assert_one_sentence(raised.value)
    assert str(work / name / Path(file).parts[0]) in str(raised.value)


def test_weights_are_safetensors_of_plain_names(work: Path) -> None:
    transformer = work / "dit" / "transformer"
    weights = transformer / "diffusion_pytorch_model.safetensors"
    index = transformer / "diffusion_pytorch_model.safetensors.index.json"
    names = dict.fromkeys(load_file(weights), "model.bin")
    for weight_map in (names, dict.fromkeys(names, "../x.safetensors"), {"x": 3}, {}, [], None):
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        with pytest.raises(UserError, match="index.json"):
            load_pipeline(work / "dit")
    index.unlink()
    tensors = load_file(weights)
    for content in (b"", b"\xff" * 8, b"\x08" + b"\0" * 7 + b'{"a": 1}', weights.read_bytes()[:-10]):
        replace_file(weights, content)
        with pytest.raises(UserError, match="cannot be read"):
            load_pipeline(work / "dit")
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, weights)
    with pytest.raises(UserError, match="of type I8"):
        load_pipeline(work / "dit")
    weights.unlink()
    torch.save(tensors, transformer / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="There is no diffusion_pytorch_model.safetensors"):
        load_pipeline(work / "dit")
    os.mkfifo(weights)
    with pytest.raises(UserError, match="no regular file"):
        load_pipeline(work / "dit")


def json_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.json"))


@pytest.mark.parametrize("door", ["own", "dit", "sd3"])
def test_no_file_of_a_folder_may_be_a_pipe_or_a_folder(door: str, work: Path, valid: Path) -> None:
    for path in json_files(work / door):
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(UserError):
            load_pipeline(work / door)
        path.unlink()
        path.mkdir()
        with pytest.raises(UserError):
            load_pipeline(work / door)
        path.rmdir()
        path.write_bytes(content)
    load_pipeline(work / door)


def import_parts(folder: Path) -> None:
    """What `rmoe convert from-hf` reads of a pipeline's folder before it builds a model."""
    from rmoe_megatron.conversion.pipeline_settings import read_settings

    architecture = read_architecture(folder / "transformer", TEXT_LENGTH)
    read_settings(folder, str(folder), architecture.diffusion)


def encoder_parts(folder: Path) -> None:
    """What training loads of a folder."""
    cpu = torch.device("cpu")
    encode_captions(load_text_encoder(EncodersConfig(text_encoder=str(folder)), TEXT_LENGTH, cpu), ["a cat"])
    load_autoencoder(str(folder), cpu)


def test_encoders_of_training_are_read_alike(work: Path) -> None:
    encoder_parts(work / "sd3")
    change(work / "sd3" / "text_encoder_3" / "config.json", num_layers=10**6)
    with pytest.raises(UserError, match="text_encoder_3/config.json has num_layers"):
        encoder_parts(work / "sd3")
    change(work / "sd3" / "vae" / "config.json", latent_channels="4")
    with pytest.raises(UserError, match="latent_channels"):
        load_autoencoder(str(work / "sd3"), torch.device("cpu"))
    with pytest.raises(UserError, match="latent_channels"):
        import_parts(work / "sd3")


SCALARS = (
    st.none() | st.booleans() | st.sampled_from([0, -1, 1, 2, 3, 7, 64, 255, 257, 10**6, 2**63, 10**40])
    | st.floats() | st.text(max_size=8)
    | st.sampled_from(["__builtins__", "../x", "os", "auto", "planted", "AutoencoderKL", "gelu", "linear"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys to every value in a tree."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:60]:
        found += places(inner, (*path, key))
    return found


@st.composite
def mutations(draw: st.DrawFn, content: bytes) -> bytes:
    """One JSON file changed: a value, a key, or bytes."""
    kind = draw(st.sampled_from(["value", "value", "value", "key", "twice", "cut", "insert"]))
    text = content.decode()
    if kind in ("value", "key"):
        tree = json.loads(text)
        path = draw(st.sampled_from(places(tree)))
        if not path:
            return json.dumps(draw(VALUES)).encode(errors="surrogatepass")
        parent = functools.reduce(lambda value, key: value[key], path[:-1], tree)
        if kind == "value":
            parent[path[-1]] = draw(VALUES)
        else:
            del parent[path[-1]]
        return json.dumps(tree).encode(errors="surrogatepass")
    position = draw(st.integers(0, len(content)))
    if kind == "twice":
        return (text[:1] + json.dumps(draw(st.text(max_size=3))) + ": 1, " + text[1:]).encode()
    if kind == "cut":
        return content[:position]
    return content[:position] + draw(st.binary(min_size=1, max_size=4)) + content[position:]


cheap = settings(
    max_examples=int(os.environ.get("RMOE_FUZZ_EXAMPLES", "40")), deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


def outcome(action: Callable[[], object]) -> None:
    """Success or one sentence; anything else that is raised fails the test."""
    try:
        action()
    except UserError as error:
        assert_one_sentence(error)


@pytest.mark.parametrize("name", PROMPTS)
@given(data=st.data())
@cheap
def test_a_changed_file_is_loaded_or_refused(name: str, data: st.DataObject, work: Path, valid: Path) -> None:
    file = data.draw(st.sampled_from(json_files(valid / name))).relative_to(valid / name)
    original = (valid / name / file).read_bytes()
    replace_file(work / name / file, data.draw(mutations(original)))
    try:
        outcome(lambda: draw(work / name, PROMPTS[name]))
        outcome(lambda: import_parts(work / name))
        if name == "sd3":
            outcome(lambda: encoder_parts(work / name))
    finally:
        replace_file(work / name / file, original)
    assert not (valid / "executed").exists()


@functools.cache
def dit_state() -> dict[str, torch.Tensor]:
    return facebook_state(make_model("dit"))


@st.composite
def odd_tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors that no checkpoint of a DiT has."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 32, 1152]), max_size=5))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64]))
    if draw(st.booleans()):
        return torch.zeros(1, dtype=dtype).expand(shape or [10**6] * 3)
    shape = shape if all(shape) and len(shape) < 3 else [2] * len(shape)
    tensor = torch.zeros(shape, dtype=dtype)
    return tensor.to_sparse() if tensor.dim() and draw(st.booleans()) else tensor


@st.composite
def odd_states(draw: st.DrawFn) -> object:
    """The weights of a DiT, changed in one or two places."""
    state: dict[Any, Any] = dict(dit_state())
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(map(str, state))))
        kind = draw(st.sampled_from(["value", "tensor", "name", "delete", "add", "whole"]))
        if kind == "delete":
            state.pop(name, None)
        elif kind == "value":
            state[name] = draw(VALUES)
        elif kind == "tensor":
            state[name] = draw(odd_tensors())
        elif kind == "whole":
            return draw(VALUES | st.dictionaries(st.sampled_from(["ema", "model"]), VALUES))
        else:
            number = st.sampled_from(["x", "-1", "9999", "99999999999", "٣", "1.0", ""])
            odd = draw(st.integers() | st.text(max_size=6) | number.map(lambda n: f"blocks.{n}.mlp.fc1.bias"))
            state[odd] = state.get(name) if kind == "add" else state.pop(name, None)
    return draw(st.sampled_from([state, {"ema": state}, {"model": state, "ema": state}]))


@given(content=odd_states())
@cheap
def test_a_changed_dit_file_is_read_or_refused(content: object, work: Path) -> None:
    path = work / "dit.pt"
    torch.save(content, path)

    def read() -> None:
        source = FacebookDiT(path, 2)
        check_tensors(source, empty_dit(), str(path))
        for name in source.shapes:
            source.read(name)

    outcome(read)


@functools.cache
def empty_dit() -> torch.nn.Module:
    return make_model("dit").to("meta")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"pos_embed": 3}, "no named tensor"),
        ({3: torch.zeros(1)}, "no named tensor"),
        ({"x_embedder.proj.weight": torch.zeros(())}, "not 4 axes"),
        ({"x_embedder.proj.weight": torch.zeros(1).expand(10**6, 10**6, 2, 2)}, "no plain tensor"),
        ({"y_embedder.embedding_table.weight": torch.zeros(0, 32)}, "no plain tensor"),
        ({"final_layer.linear.bias": torch.zeros(32, dtype=torch.int64)}, "no plain tensor"),
        ({"pos_embed": torch.zeros(16)}, "pos_embed has not 3 axes"),
        ({"blocks.x.mlp.fc1.bias": torch.zeros(1)}, "unexpected blocks.x.mlp"),
        ({"blocks.9999.mlp.fc1.bias": torch.zeros(1)}, "more than 256"),
        ({"blocks.99999999999.mlp.fc1.bias": torch.zeros(1)}, "unexpected blocks.999"),
        (
            {"blocks.0.attn.qkv.bias": torch.zeros(2)},
            r"blocks.0.attn.qkv.bias has shape \(2,\) instead of 96 rows",
        ),
        (
            {"blocks.0.attn.qkv.weight": torch.zeros(())},
            r"blocks.0.attn.qkv.weight has shape \(\) instead of 96 rows",
        ),
    ],
)
def test_wrong_entries_of_a_dit_file_are_refused(
    values: dict[Any, Any], complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "dit.pt"
    for content in (dit_state() | values, {"ema": dit_state() | values, "model": {}}):
        torch.save(content, path)
        with pytest.raises(UserError, match=complaint) as raised:
            check_tensors(FacebookDiT(path, 2), empty_dit(), str(path))
        assert_one_sentence(raised.value)
        assert str(path) in str(raised.value)
    for content in (3, [1], {"ema": None}, {"ema": [torch.zeros(1)]}):
        torch.save(content, path)
        with pytest.raises(UserError, match="is not a DiT checkpoint"):
            FacebookDiT(path, 2)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="no regular file"):
        FacebookDiT(path, 2)


def test_the_empty_caption_of_precomputed_shards_has_the_model_s_shape(tmp_path: Path) -> None:
    config = tiny_config()
    shapes = {"text_hidden_states": (1, 5, 12), "text_pooled": (1, 10)}
    right = {name: torch.ones(shape) for name, shape in shapes.items()}
    path = tmp_path / NULL_TEXT
    save_file(right, path)
    read = read_null_text(path, config.model, torch.device("cpu"))
    assert {name: tuple(tensor.shape) for name, tensor in read.tensors().items()} == shapes
    for wrong in (
        {"text_pooled": right["text_pooled"]},
        right | {"x": torch.ones(1)},
        right | {"text_pooled": torch.ones(10)},
    ):
        save_file(wrong, path)
        with pytest.raises(UserError, match="precompute the data again"):
            read_null_text(path, config.model, torch.device("cpu"))
    path.write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read"):
        read_null_text(path, config.model, torch.device("cpu"))
