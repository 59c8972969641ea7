"""What ``rmoe config`` says of every key, and the JSON schema for editors, against the loader and the project's own files."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rmoe_megatron.cli.app import app
from rmoe_megatron.config.loading import load_config
from rmoe_megatron.config.reference import find_keys, keys, schema
from rmoe_megatron.config.validation import validate
from rmoe_megatron.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TYPES = {"string": str, "integer": int, "boolean": bool, "object": dict, "array": list, "null": type(None)}


def refused(value: Any, kind: dict[str, Any], where: str = "") -> str | None:
    """What is wrong with a value by the parts of JSON Schema that are used, the first that there is."""
    if "anyOf" in kind:
        wrong = [refused(value, each, where) for each in kind["anyOf"]]
        return None if None in wrong else wrong[0]
    if "enum" in kind:
        return None if value in kind["enum"] else f"{where} is none of {kind['enum']}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind["type"] == "number" and not is_number:
        return f"{where} is no number"
    if kind["type"] != "number" and (
        not isinstance(value, TYPES[kind["type"]]) or (kind["type"] == "integer" and not is_number)
    ):
        return f"{where} is no {kind['type']}"
    limits = {
        "minimum": lambda limit: value >= limit,
        "maximum": lambda limit: value <= limit,
        "exclusiveMinimum": lambda limit: value > limit,
        "exclusiveMaximum": lambda limit: value < limit,
    }
    for name, holds in limits.items():
        if name in kind and not holds(kind[name]):
            return f"{where} breaks {name}"
    if kind["type"] == "array":
        return next(filter(None, (refused(each, kind["items"], f"{where}[]") for each in value)), None)
    if "properties" in kind:
        for name, each in value.items():
            if name not in kind["properties"]:
                return f"{where}.{name} is unknown"
            if wrong := refused(each, kind["properties"][name], f"{where}.{name}"):
                return wrong
    return None


def test_every_key_has_a_sentence() -> None:
    for key in keys():
        assert re.match(r"[A-Z].*\.$", key.meaning), key
        assert len(key.meaning.split()) >= 3, key


def test_a_key_is_shown_with_type_bounds_default_and_meaning() -> None:
    (shown,) = map(str, find_keys("optimizer.ema_decay"))
    assert shown == (
        "optimizer.ema_decay: number, at least 0 and at most 1; default 0.999\n    The decay of the weights' moving average."
    )
    assert str(find_keys("model.hidden_size")[0]).splitlines()[0] == (
        "model.hidden_size: integer, at least 1 and at most 65536; has to be given"
    )
    assert [key.name for key in find_keys("data.mixture")] == [
        "data.mixture", "data.mixture[].path", "data.mixture[].weight", "data.mixture[].epochs",
    ]  # fmt: skip
    assert find_keys("data.mixture[3].path") == find_keys("data.mixture[].path")


def test_a_key_that_is_not_there_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no key optimizer.ema_deacy; did you mean optimizer.ema_decay\?"):
        find_keys("optimizer.ema_deacy")


def test_the_command_prints_keys_or_the_schema() -> None:
    runner = CliRunner()
    assert "optimizer.beta1: number" in runner.invoke(app, ["config", "optimizer"]).output
    printed = json.loads(runner.invoke(app, ["config", "--schema"]).output)
    assert printed["properties"]["seed"]["maximum"] == 2**32 - 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_schema_takes_the_files_of_the_project(path: Path) -> None:
    assert refused(yaml.safe_load(path.read_text()), schema()) is None


def test_the_schema_takes_class_labels_as_the_loader_does() -> None:
    settings = yaml.safe_load((ROOT / "configs" / "shapes_tiny.yaml").read_text())
    settings["training"]["sample_prompts"] = [3, "4"]
    assert refused(settings, schema()) is None


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optimizer", "learning_rte", 1),
        ("optimizer", "ema_decay", 1.5),
        ("optimizer", "beta1", 1),  # below 1
        ("optimizer", "learning_rate", 0),  # above 0
        ("optimizer", "distributed_optimizer", "perhaps"),
        ("optimizer", "lr_decay_style", "steep"),
        ("training", "micro_batch_size", 0),
        ("training", "sample_prompts", "a red circle"),
        ("data", "shuffle", None),
        ("recurrence", "layers", "all"),
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(
    tmp_path: Path, section: str, key: str, value: Any
) -> None:
    settings = yaml.safe_load((ROOT / "configs" / "shapes_tiny.yaml").read_text())
    settings[section][key] = value
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError):
        validate(load_config(tmp_path / "run.yaml", []), world_size=1)
    assert refused(settings, schema()) is not None
