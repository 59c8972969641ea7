"""Help, version, completion; and that neither help nor a mistake waits for what is slow to import."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from rmoe_megatron.cli.app import app
from rmoe_megatron.pretrained.model_files import DIFFUSERS_WEIGHTS
from tests.support.runs import make_run

SLOW = (
    "torch",
    "megatron",
    "diffusers",
    "transformers",
    "numpy",
    "scipy",
    "PIL",
    "matplotlib",
    "omegaconf",
    "deepspeed",
)
PROBE = """
import json, sys
from rmoe_megatron.cli import main
sys.argv = ["rmoe", *json.loads(sys.argv[1])]
code = 0
try:
    main()
except SystemExit as end:
    code = end.code
print(json.dumps([code, sorted(name for name in json.loads(sys.stdin.read()) if name in sys.modules)]))
"""


def commands() -> Iterator[tuple[list[str], Any]]:
    """Every command and group by its words, ``[]`` for rmoe itself."""

    def walk(words: list[str], command: Any) -> Iterator[tuple[list[str], Any]]:
        yield words, command
        for name, each in getattr(command, "commands", {}).items():
            yield from walk([*words, name], each)

    yield from walk([], typer.main.get_command(app))


COMMANDS = list(commands())


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 20


@pytest.mark.parametrize(
    ("words", "command"), COMMANDS, ids=[" ".join(words) or "rmoe" for words, _ in COMMANDS]
)
def test_help_is_made_of_sentences(words: list[str], command: Any) -> None:
    texts = [command.help, *(each.help for each in command.params if each.name != "help")]
    for text in texts:
        assert text, words
        for sentence in re.split(r"(?<=[.!?])\s+", text.strip()):
            assert sentence[0].isupper() or sentence[0].isdigit(), text
            assert sentence[-1] in ".!?", text
            assert not sentence.startswith("Of "), text
            assert len(sentence.split()) >= 3, text


@pytest.mark.parametrize(
    ("words", "command"), COMMANDS, ids=[" ".join(words) or "rmoe" for words, _ in COMMANDS]
)
def test_help_has_an_example_that_can_be_typed(words: list[str], command: Any) -> None:
    example = re.fullmatch(r"Example: ((?:srun \S+ )?rmoe .*)", command.epilog or "")
    assert example, command.epilog
    typed = shlex.split(example.group(1))
    arguments = typed[typed.index("rmoe") + 1 :]
    assert arguments[: len(words)] == words
    found, rest = typer.main.get_command(app), arguments
    while getattr(found, "commands", None):
        found, rest = found.commands[rest[0]], rest[1:]
    found.make_context("rmoe", list(rest))  # raises where an argument is missing, unknown or of another type


def test_help_shows_defaults() -> None:
    import click

    for words, command in COMMANDS:
        shown = command.get_help(click.Context(command)) if not hasattr(command, "commands") else ""
        for each in command.params:
            if (
                getattr(each, "default", None) not in (None, False, ())
                and not callable(each.default)
                and shown
            ):
                assert str(each.default) in " ".join(shown.split()) or "default" in shown, (words, each.name)


def probe(*arguments: str, **variables: str) -> tuple[int, str, list[str]]:
    """Run a command in a new interpreter; returns its code, what it printed, and which slow modules it imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(arguments)],
        input=json.dumps(SLOW), capture_output=True, text=True, timeout=120, env={**os.environ, **variables},
    )  # fmt: skip
    *printed, last = done.stdout.splitlines()
    code, imported = json.loads(last)
    return code, "\n".join(printed) + done.stderr, imported


def test_version_and_help_import_nothing_slow() -> None:
    code, printed, imported = probe("--version")
    assert (code, imported) == (0, [])
    assert re.fullmatch(rf"rmoe-megatron {re.escape(version('rmoe-megatron'))}, code [0-9a-f]{{16}}", printed)
    code, printed, imported = probe("--help")
    assert (code, imported) == (0, [])
    assert "--install-completion" in printed
    assert "Example: rmoe train" in printed


def test_completion_completes() -> None:
    words = {"_RMOE_COMPLETE": "complete_bash", "COMP_WORDS": "rmoe eval gen", "COMP_CWORD": "2"}
    done = subprocess.run(
        [Path(sys.executable).with_name("rmoe")], capture_output=True, text=True, timeout=60, env={**os.environ, **words}
    )  # fmt: skip
    assert done.stdout.split() == ["geneval", "geneval2"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "dpg", "{folder}", "--data", "none.csv", "--out", "{folder}/o"], "curl -LO https://raw.githubusercontent.com/"),
        (["eval", "dpg", "{folder}", "--data", "{config}", "--out", "{folder}/o"], "pip install modelscope"),
        (["eval", "geneval2", "{folder}", "--data", "none.jsonl", "--out", "{folder}/o"], "curl -LO https://raw.githubusercontent.com/"),
        (["eval", "geneval2", "{folder}", "--data", "{config}", "--out", "{folder}/o"], "hf download Qwen/Qwen3-VL-8B-Instruct"),
        (["eval", "geneval", "{folder}", "--out", "{folder}/o"], "hf download facebook/mask2former-swin-small-coco-instance"),
        (["eval", "corebench", "{folder}", "--data", "none", "--out", "{folder}/o"], "git clone https://github.com/KlingTeam/T2I-CoReBench"),
        (["eval", "preference", "{folder}", "--weights", "own/scorer", "--out", "{folder}/o"], "hf download own/scorer"),
        (["eval", "preference", "{folder}", "--out", "{folder}/o"], "hf download yuvalkirstain/PickScore_v1"),
        (["eval", "preference", "{folder}", "--scorer", "hpsv3", "--weights", "{folder}", "--out", "{folder}/o"],
         "hf download Qwen/Qwen2-VL-7B-Instruct"),
        (["eval", "preference", "{folder}", "--scorer", "other", "--out", "{folder}/o"], "must be pickscore or hpsv3"),
        (["eval", "preference", "nowhere", "--out", "{folder}/o"], "There is no folder nowhere"),
        (["eval", "geneval", "nowhere", "--out", "{folder}/o"], "nowhere is no folder"),
        (["eval", "imagenet", "{folder}", "--reference", "none", "--inception", "none", "--out", "{folder}/o"],
         "curl -LO https://openaipublic.blob.core.windows.net/"),
        (["eval", "imagenet", "{folder}", "--reference", "{config}", "--inception", "none", "--out", "{folder}/o"],
         "curl -LO https://github.com/toshas/torch-fidelity/"),
        (["eval", "shapes", "{folder}", "--data", "none", "--out", "{folder}/o"], "rmoe data build-shapes none"),
        (["eval", "mazes", "{folder}", "--data", "none", "--out", "{folder}/o"], "rmoe data build-mazes none"),
        (["sample", "nowhere", "--prompt", "a cat"], "nowhere is no folder"),
        (["sample", "{folder}", "--prompt", "a cat"], "model_index.json"),
        (["train", "--resume", "nowhere"], "no run at nowhere"),
        (["convert", "to-hf", "nowhere", "{folder}/m"], "no run at nowhere"),
        (["convert", "from-hf", "nowhere", "{folder}/m"], "nowhere is no folder"),
        (["inspect", "nowhere"], "no run at nowhere"),
        (["convert", "push", "nowhere", "owner/name"], "nowhere holds no export"),
        (["data", "build-shapes", "{folder}"], "exists and is not an empty folder"),
        (["data", "build-mazes", "{folder}"], "exists and is not an empty folder"),
        (["data", "pack", "nowhere", "{folder}/o"], "There is no folder or table nowhere"),
        (["data", "pack", "{folder}", "{folder}"], "exists and is not an empty folder"),
        (["data", "check", "nowhere", "{folder}/o"], "There is no shard folder nowhere"),
        (["data", "index", "nowhere"], "There is no shard folder nowhere"),
        (["data", "show", "nowhere"], "There is no shard folder nowhere"),
        (["eval", "compare", "nowhere", "{folder}", "--out", "{folder}/o"], "There is no nowhere"),
    ],
)  # fmt: skip
def test_a_mistake_is_said_before_anything_slow_is_imported(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    config = make_run(tmp_path)
    command = [each.format(folder=tmp_path, config=config) for each in arguments]
    code, printed, imported = probe(*command, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    assert code == 2, printed
    assert words in printed
    assert imported == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "{config}", "model.hiden_size=3"], "did you mean model.hidden_size?"),
        (["train", "{config}", "parallel.tensor_model_parallel_size=2"], "is not divisible by"),
        (["train", "{config}", "data.train=nowhere"], "There is no shard folder nowhere"),
        (["train", "{config}", "--check", "data.train=nowhere"], "There is no shard folder nowhere"),
        (["data", "precompute", "nowhere.yaml", "a", "b"], "nowhere.yaml"),
        (["data", "precompute", "{config}", "nowhere", "b"], "There is no folder nowhere"),
        (["plan", "nowhere.yaml"], "nowhere.yaml"),
        (["plan", "{config}", "--write", "b.yaml"], "--write goes with --search"),
    ],
)
def test_a_mistake_in_a_configuration_waits_for_its_reader_alone(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    config = make_run(tmp_path)
    code, printed, imported = probe(*[each.format(config=config) for each in arguments])
    assert code == 2, printed
    assert words in printed
    assert imported == ["omegaconf"]


def test_the_name_of_weights_is_that_of_diffusers() -> None:
    assert DIFFUSERS_WEIGHTS == SAFETENSORS_WEIGHTS_NAME
