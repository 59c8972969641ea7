"""Every architecture against diffusers' own classes: imported, run, differentiated, exported."""

import json
import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, ModelMixin, SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from rmoe_megatron.checkpoint.weights import RunWeights
from rmoe_megatron.cli import main
from rmoe_megatron.config.model import RecurrenceConfig
from rmoe_megatron.config.run import Precision, RunConfig
from rmoe_megatron.conversion.export import export_run
from rmoe_megatron.conversion.weight_names import to_diffusers
from rmoe_megatron.distributed.device import PARAMS_DTYPE
from rmoe_megatron.errors import UserError
from rmoe_megatron.hf import RecurrentDiTTransformer2DModel, RecurrentSD3Transformer2DModel
from tests.support.commands import rmoe
from tests.support.configurations import one_rank, randomise
from tests.support.diffusers_models import (
    ARCHITECTURES,
    TEXT_LENGTH,
    in_memory,
    inputs,
    make_model,
    run_ours,
    save_model,
)

NO_SIZES = ("-5GB", "0GB", "0.0001KB", "5", "GB", "nanGB", "1e999GB", "many")
RECURRENCE = RecurrenceConfig(layers=[0, 2], num_modules=3, steps=3, rank=4)


RECURRENCE_SETTINGS: dict[str, Any] = {
    "layers": [0, 2],
    "num_modules": 3,
    "steps": 3,
    "rank": 4,
    "modulation": True,
    "gate_inputs": ["tokens", "conditioning"],
}


def make_own_model(name: str, recurrence: dict[str, Any] | None) -> ModelMixin:
    """A random model of this package's diffusers class."""
    own = RecurrentDiTTransformer2DModel if name.startswith("dit") else RecurrentSD3Transformer2DModel
    model = own(**ARCHITECTURES[name][1], recurrence=recurrence)
    randomise(model)
    if name == "dit":
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    return model.eval()


def import_model(folder: Path, run: Path) -> RunWeights:
    from rmoe_megatron.config.run import ParallelConfig
    from rmoe_megatron.conversion.importing import import_diffusers

    import_diffusers(folder, run, TEXT_LENGTH, ParallelConfig())
    return RunWeights(run)


def load_ours(weights: RunWeights, recurrence: RecurrenceConfig | None = None) -> Any:
    """Build the Megatron-Core model and give it the imported weights; needs process groups."""
    from rmoe_megatron.checkpoint.model_state import load_weights
    from rmoe_megatron.model.build import build_transformer

    config = replace(weights.config, recurrence=recurrence or weights.config.recurrence)
    model = build_transformer(config, initialise=False)
    load_weights(torch.nn.ModuleList([model]), weights, fresh=lambda name: ".recurrence." in name)
    return model


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-6)
    assert error < 1e-5, f"{what} differs by {error:.2e}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_output_and_gradients_equal_diffusers(name: str, tmp_path: Path) -> None:
    theirs = save_model(name, tmp_path / "model")
    weights = import_model(tmp_path / "model", tmp_path / "run")
    assert weights.config.model.shared_conditioning == (name != "dit-own-embeddings")
    arguments = inputs(name)
    with one_rank(weights.config):
        ours = load_ours(weights)
        output = run_ours(ours, arguments)
        expected = theirs(**arguments).sample
        assert_close(output, expected, "output")
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(4))
        (output * direction).sum().backward()
        (expected * direction).sum().backward()
        gradients = {
            key: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for key, parameter in ours.named_parameters()
        }
        renamed = to_diffusers(gradients, weights.config.model)
    compare_gradients(theirs, renamed, weights.config)


def compare_gradients(theirs: ModelMixin, ours: dict[str, torch.Tensor], config: RunConfig) -> None:
    """Every parameter's gradient; where blocks share embeddings ours is the sum over diffusers' copies."""
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name in expected:
        if ".norm1.emb." in name and config.model.shared_conditioning:
            local = name.split(".norm1.")[1]
            copies = [value for other, value in expected.items() if other.endswith(f".norm1.{local}")]
            total = torch.stack([copy for copy in copies if copy is not None]).sum(0)
            assert_close(ours[name], total, f"gradient of {name}")
        elif name.endswith("attn1.to_k.bias"):
            # Softmax does not see what is added to all keys alike: zero but for rounding.
            scale = expected[name.replace("bias", "weight")].norm()
            assert max(ours[name].norm(), expected[name].norm()) < 1e-4 * scale, name
        elif expected[name] is None or expected[name].norm() < 1e-6:
            assert ours[name].norm() < 1e-5, name
        else:
            assert_close(ours[name], expected[name], f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_import_and_export_give_back_the_same_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(name).to(dtype)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    import_model(tmp_path / "model", tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    transformer = tmp_path / "out" / "transformer"
    exported = load_file(transformer / "diffusion_pytorch_model.safetensors")
    original = model.state_dict()
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[key], original[key]) and exported[key].dtype == dtype for key in exported)
    config = json.loads((transformer / "config.json").read_text())
    assert config["_class_name"] == type(model).__name__
    again = in_memory(type(model).from_pretrained(transformer, torch_dtype=dtype).eval())
    model = in_memory(type(model).from_pretrained(tmp_path / "model", torch_dtype=dtype).eval())
    arguments = {
        key: value.to(dtype) if key != "timestep" and value.is_floating_point() else value
        for key, value in inputs(name).items()
    }
    with torch.no_grad():
        assert bool((again(**arguments).sample == model(**arguments).sample).all())


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fresh_recurrence_keeps_outputs_bit_for_bit(name: str, steps: int, tmp_path: Path) -> None:
    save_model(name, tmp_path / "model")
    weights = import_model(tmp_path / "model", tmp_path / "run")
    arguments = inputs(name)
    with one_rank(weights.config), torch.no_grad():
        plain = load_ours(weights)
        recurrent = load_ours(weights, replace(RECURRENCE, steps=steps))
        assert torch.equal(run_ours(recurrent, arguments), run_ours(plain, arguments))
        randomise(recurrent.transformer.layers[0].recurrence)
        assert not torch.equal(run_ours(recurrent, arguments), run_ours(plain, arguments))


@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium", "dit", "dit-own-embeddings"])
def test_recurrent_model_round_trip(name: str, tmp_path: Path) -> None:
    """A recurrent diffusers model (random) equals the training model it is imported to, and comes back the same."""
    theirs = make_own_model(name, RECURRENCE_SETTINGS)
    own = type(theirs)
    theirs.save_pretrained(tmp_path / "model")
    weights = import_model(tmp_path / "model", tmp_path / "run")
    batch = inputs(name)
    with one_rank(weights.config), torch.no_grad():
        assert_close(run_ours(load_ours(weights).eval(), batch), theirs(**batch).sample, "output")
    export_run(tmp_path / "run", tmp_path / "out", max_shard_size="40KB")
    assert len(list((tmp_path / "out" / "transformer").glob("*.safetensors"))) > 1
    again = in_memory(own.from_pretrained(tmp_path / "out" / "transformer", device_map="cpu"))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in theirs.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(**batch).sample, theirs(**batch).sample)
    half = own.from_pretrained(tmp_path / "out" / "transformer", torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    half.save_pretrained(tmp_path / "again")
    assert own.from_pretrained(tmp_path / "again").config.recurrence == theirs.config.recurrence


def test_recurrence_beside_a_second_attention_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = make_own_model("sd3.5-medium", RECURRENCE_SETTINGS)
    logger = logging.getLogger("diffusers")  # does not propagate to the root logger
    logger.addHandler(caplog.handler)
    try:
        model(**inputs("sd3.5-medium"))
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["sd3-medium", "dit"])
def test_without_recurrence_our_class_is_diffusers(name: str) -> None:
    cls, arguments = ARCHITECTURES[name]
    own = RecurrentDiTTransformer2DModel if name == "dit" else RecurrentSD3Transformer2DModel
    theirs, ours = make_model(name), own(**arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(**inputs(name)).sample, theirs(**inputs(name)).sample)


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["proj_out.weight"]


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["surprise"] = torch.zeros(1)


def _reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["proj_out.bias"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_drop, ["missing proj_out.weight"]),
        (_add, ["unexpected surprise"]),
        (_reshape, ["proj_out.bias has shape (3,) instead of (16,)"]),
    ],
)
def test_wrong_tensors_are_listed_and_nothing_is_written(
    damage: Callable[[dict[str, torch.Tensor]], None], words: list[str], tmp_path: Path
) -> None:
    save_model("sd3-medium", tmp_path / "model")
    path = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError) as error:
        import_model(tmp_path / "model", tmp_path / "run")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("value", "dtype"), [(1e5, torch.float16), (1e39, torch.bfloat16)])
def test_weights_beyond_a_data_type_are_named_and_nothing_is_written(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make_model("dit").double()
    model.proj_out_2.bias.data[0] = value
    model.save_pretrained(tmp_path / "model")
    import_model(tmp_path / "model", tmp_path / "run")
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        UserError, match=f"has 1 values in .*bias that are not finite in {name}; choose another --dtype"
    ):
        export_run(tmp_path / "run", tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()
    export_run(tmp_path / "run", tmp_path / "out", dtype=torch.float64)


def test_weights_that_are_no_numbers_are_not_imported(tmp_path: Path) -> None:
    model = make_model("dit")
    model.proj_out_2.bias.data[3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(
        UserError, match=r"has 1 values in proj_out_2\.bias that are not finite.*download the model again"
    ):
        import_model(tmp_path / "model", tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.distcp"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "UNet2DConditionModel"}, ["UNet2DConditionModel", "SD3Transformer2DModel"]),
        ({"qk_norm": "layer_norm"}, ["qk_norm", "layer_norm"]),
        ({"out_channels": 5}, ["out_channels", "5"]),
    ],
)
def test_other_variants_are_refused(change: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    save_model("sd3-medium", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as error:
        import_model(tmp_path / "model", tmp_path / "run")
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        *[("--max-shard-size", size, f"--max-shard-size {size} must be") for size in NO_SIZES],
        ("--base", "nope", "has no frozen base, its checkpoint holds all weights; leave --base nope out"),
    ],
)
def test_wrong_export_options_get_one_sentence(
    option: str,
    value: str,
    words: str,
    imported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["convert", "to-hf", str(imported), str(tmp_path / "out"), f"{option}={value}"]
    monkeypatch.setattr("sys.argv", ["rmoe", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    errors = capsys.readouterr().err
    assert stopped.value.code == 2
    assert errors.startswith("error: ")
    assert words in errors
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imported run; it has no frozen base."""
    folder = tmp_path_factory.mktemp("imported")
    save_model("dit", folder / "model")
    import_model(folder / "model", folder / "run")
    return folder / "run"


def test_truncated_weights_are_named(tmp_path: Path) -> None:
    save_model("dit", tmp_path / "model")
    path = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="safetensors cannot be read"):
        import_model(tmp_path / "model", tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "recurrence", "settings"),
    [
        ("sd3.5-medium", None, ["tensor_model_parallel_size=2", "sequence_parallel=true"]),
        ("sd3.5-large", None, ["pipeline_model_parallel_size=2"]),
        ("dit", RECURRENCE_SETTINGS | {"num_modules": 2}, ["expert_model_parallel_size=2"]),
    ],
    ids=["tensor", "pipeline", "expert"],
)
def test_import_on_two_ranks_gives_the_same_checkpoint(
    name: str, recurrence: dict[str, Any] | None, settings: list[str], tmp_path: Path
) -> None:
    make_own_model(name, recurrence).save_pretrained(tmp_path / "model")
    one = import_model(tmp_path / "model", tmp_path / "one")
    arguments = ["convert", "from-hf", str(tmp_path / "model"), str(tmp_path / "two")]
    overrides = [f"parallel.{setting}" for setting in settings]
    code, errors = rmoe(*arguments, "--text-length", str(TEXT_LENGTH), *overrides, ranks=2)
    assert code == 0, errors
    assert RunWeights(tmp_path / "two").fingerprint() == one.fingerprint()


def test_import_into_an_interleaved_layout_is_refused(tmp_path: Path) -> None:
    make_own_model("sd3.5-large", None).save_pretrained(tmp_path / "model")
    layout = ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]
    arguments = ["convert", "from-hf", str(tmp_path / "model"), str(tmp_path / "run")]
    code, errors = rmoe(*arguments, "--text-length", str(TEXT_LENGTH), *layout, ranks=2)
    assert code != 0
    assert "is for training" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_start_a_run_of_any_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model("sd3-medium").to(dtype)
    model.save_pretrained(tmp_path / "model")
    weights = import_model(tmp_path / "model", tmp_path / "run")
    for precision in (Precision.fp32, Precision.bf16):
        weights.config = replace(weights.config, precision=precision)
        with one_rank(weights.config):
            state = to_diffusers(load_ours(weights).state_dict(), weights.config.model)
        for name, value in model.state_dict().items():
            expected = value.to(PARAMS_DTYPE[precision])
            assert state[name].dtype == expected.dtype, name
            assert torch.equal(state[name], expected), name


class LiveBytes:
    """Wraps a function that loads tensors; knows how much of what it has returned is alive at each call."""

    def __init__(self, load: Callable[..., torch.Tensor]) -> None:
        self.load = load
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __call__(self, *arguments: Any) -> torch.Tensor:
        tensor = self.load(*arguments)
        number = len(self.alive)
        while number in self.alive:
            number += 1
        self.alive[number] = tensor.nbytes
        weakref.finalize(tensor, self.alive.pop, number)
        self.peak = max(self.peak, sum(self.alive.values()))
        return tensor


@pytest.mark.parametrize("name", ["sd3-medium", "dit"])
def test_conversion_holds_one_layer_at_a_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rmoe_megatron.checkpoint.weights import CheckpointReader
    from rmoe_megatron.pretrained.safetensors_folder import SafetensorsFolder

    model = save_model(name, tmp_path / "model")
    layer = sum(value.nbytes for value in model.transformer_blocks[0].parameters())
    total = sum(value.nbytes for value in model.parameters())
    read, written = LiveBytes(SafetensorsFolder.read), LiveBytes(CheckpointReader.read)
    monkeypatch.setattr(SafetensorsFolder, "read", lambda *arguments: read(*arguments))
    monkeypatch.setattr(CheckpointReader, "read", lambda *arguments: written(*arguments))
    import_model(tmp_path / "model", tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out", max_shard_size="10KB")
    assert 0 < read.peak <= layer < total
    assert 0 < written.peak <= layer + 10_000 < total


def facebook_state(model: DiTTransformer2DModel) -> dict[str, torch.Tensor]:
    """The weights in the layout of facebookresearch/DiT's checkpoints."""
    state = model.state_dict()
    found = {"pos_embed": torch.zeros(1, 16, 32)}  # 4 x 4 patches of 2: latents of 8
    for parameter in ("weight", "bias"):
        found[f"x_embedder.proj.{parameter}"] = state[f"pos_embed.proj.{parameter}"]
        found[f"final_layer.adaLN_modulation.1.{parameter}"] = state[f"proj_out_1.{parameter}"]
        found[f"final_layer.linear.{parameter}"] = state[f"proj_out_2.{parameter}"]
        embedder = "transformer_blocks.0.norm1.emb.timestep_embedder"
        found[f"t_embedder.mlp.0.{parameter}"] = state[f"{embedder}.linear_1.{parameter}"]
        found[f"t_embedder.mlp.2.{parameter}"] = state[f"{embedder}.linear_2.{parameter}"]
        for block in range(model.config.num_layers):
            theirs, ours = f"blocks.{block}", f"transformer_blocks.{block}"
            parts = [state[f"{ours}.attn1.to_{part}.{parameter}"] for part in "qkv"]
            found[f"{theirs}.attn.qkv.{parameter}"] = torch.cat(parts)
            found[f"{theirs}.attn.proj.{parameter}"] = state[f"{ours}.attn1.to_out.0.{parameter}"]
            found[f"{theirs}.mlp.fc1.{parameter}"] = state[f"{ours}.ff.net.0.proj.{parameter}"]
            found[f"{theirs}.mlp.fc2.{parameter}"] = state[f"{ours}.ff.net.2.{parameter}"]
            found[f"{theirs}.adaLN_modulation.1.{parameter}"] = state[f"{ours}.norm1.linear.{parameter}"]
    table = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    found["y_embedder.embedding_table.weight"] = state[table]
    return found


def test_the_original_dit_layout_is_imported(tmp_path: Path) -> None:
    from rmoe_megatron.config.run import ParallelConfig
    from rmoe_megatron.conversion.importing import import_facebook_dit

    model = make_model("dit")
    torch.save(facebook_state(model), tmp_path / "dit.pt")
    import_facebook_dit(tmp_path / "dit.pt", tmp_path / "run", 2, ParallelConfig())
    assert RunWeights(tmp_path / "run").config.model.sample_size == 8
    export_run(tmp_path / "run", tmp_path / "out")
    exported = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(exported[key], value) for key, value in model.state_dict().items())


class Runs:
    """Unpickling it would call a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code from a checkpoint",))


def test_a_dit_file_with_code_or_without_a_tensor_is_refused(tmp_path: Path) -> None:
    from rmoe_megatron.conversion.facebook_dit import FacebookDiT

    torch.save({"x_embedder.proj.weight": Runs()}, tmp_path / "code.pt")
    with pytest.raises(UserError, match="plain tensors"):
        FacebookDiT(tmp_path / "code.pt")
    state = facebook_state(make_model("dit"))
    torch.save({"model": {}}, tmp_path / "empty.pt")
    with pytest.raises(UserError, match="is not a DiT checkpoint"):
        FacebookDiT(tmp_path / "empty.pt")
    del state["blocks.1.mlp.fc1.bias"]
    state["surprise"] = torch.zeros(1)
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(UserError, match="missing blocks.1.mlp.fc1.bias; unexpected surprise"):
        FacebookDiT(tmp_path / "part.pt", 2)


def test_published_sizes() -> None:
    """Parameter counts of the presets against those of diffusers' classes with the published configurations."""
    from rmoe_megatron.config.model import Architecture, ModelConfig
    from rmoe_megatron.config.presets import PRESETS
    from rmoe_megatron.config.run import DataConfig, OptimizerConfig, TrainingConfig
    from rmoe_megatron.pretrained.architecture import empty_transformer

    counts = {}
    for name in ("sd3_medium", "sd3.5_medium", "sd3.5_large", "dit_s_8", "dit_xl_2"):
        values = PRESETS[name] | {"architecture": Architecture[PRESETS[name]["architecture"]]}
        config = RunConfig(
            model=ModelConfig(**values), data=DataConfig(train=""),
            optimizer=OptimizerConfig(learning_rate=0), training=TrainingConfig(0, 0, 0),
        )  # fmt: skip
        transformer = empty_transformer(config)
        assert type(transformer) in (SD3Transformer2DModel, DiTTransformer2DModel)
        shared = sum(
            parameter.numel()
            for key, parameter in transformer.named_parameters()
            if ".norm1.emb." not in key or key.startswith("transformer_blocks.0.")
        )
        counts[name] = round(shared / 1e6)
    # Model cards: 2B, 2.5B, 8B; Peebles and Xie, table 4 and the note on parameters: S 33M, XL 675M.
    assert counts == {
        "sd3_medium": 2028, "sd3.5_medium": 2243, "sd3.5_large": 8057, "dit_s_8": 33, "dit_xl_2": 675,
    }  # fmt: skip
