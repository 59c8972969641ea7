"""Which files of a folder, or of a repository of the hub, are a model's: one answer for loading, fingerprints and downloads.

Beside a model's files there may be others: the same weights in other precisions (variants) or formats (pickles, ONNX), single
files of other programs, folders of other tools. diffusers and transformers find theirs by name, and so does this module.
"""

import json
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

from pydantic import Field, TypeAdapter, with_config

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.regular import open_regular
from rmoe_megatron.files.untrusted import OPEN, read_json

# The name of a model's weights if they are one file. diffusers has it, too, and takes seconds to import.
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # as diffusers looks for it
MODEL_INDEX = "model_index.json"  # of a pipeline
SD3_ENCODERS = {"clip_l": "", "clip_g": "_2", "t5": "_3"}  # the ends of the names of its folders
SMALL_FILES = (".json", ".txt", ".model", ".jinja")  # configurations, vocabularies, templates
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_VARIANT = r"[A-Za-z0-9_]+"
_SHARD = r"\d{5}-of-\d{5}"

# Folders of a model ("" is its own) with the name of the weights in it if they are one file; None where there are none.
type Parts = dict[str, str | None]
# From the names of all files, relative to the model's folder, to the parts that somebody needs.
type Choice = Callable[[Collection[str]], Parts]


@with_config(OPEN)
class Index(TypedDict):
    """What says in which of several files a tensor lies."""

    weight_map: Annotated[
        dict[str, Annotated[str, Field(pattern=r"^\w[\w.-]*\.safetensors$")]], Field(min_length=1)
    ]


INDEX = TypeAdapter(Index)


@dataclass(frozen=True)
class Weights:
    """The weights of a model among the files of its folder.

    Attributes:
        files: their names, in order.
        index: the file that says in which of them a tensor lies, if there is one.
        variant: as diffusers and transformers call it (``fp16``); None for the weights without a variant's name.
    """

    files: tuple[str, ...]
    index: str | None = None
    variant: str | None = None


def choose_weights(names: Collection[str], single: str, where: str) -> Weights:
    """Return the weights that diffusers or transformers load from a folder of files with these names.

    Those of a variant are taken only where it is the only one and there are none without.

    Args:
        single: the name of the weights if they are one file, :data:`DIFFUSERS_WEIGHTS` or :data:`TRANSFORMERS_WEIGHTS`.
        where: what a message calls the folder.

    Raises:
        UserError: there are none, or those of several variants alone.
    """
    plain = _of_variant(names, single, None)
    if plain is not None:
        return plain
    stem = re.escape(single.removesuffix(".safetensors"))
    patterns = (rf"{stem}\.({_VARIANT})\.safetensors", rf"{re.escape(single)}\.index\.({_VARIANT})\.json")
    variants = {found[1] for name in names for each in patterns if (found := re.fullmatch(each, name))}
    if len(variants) > 1:
        raise UserError(
            f"{where} holds the variants {' and '.join(sorted(variants))} of {single} and none without a variant's name; leave "
            "one of them."
        )
    weights = _of_variant(names, single, variants.pop()) if variants else None
    if weights is None:
        raise UserError(
            f"There is no {single} (or its index) in {where}{_instead(names)}; download the model again."
        )
    return weights


def _of_variant(names: Collection[str], single: str, variant: str | None) -> Weights | None:
    stem, addition = single.removesuffix(".safetensors"), f".{variant}" if variant else ""
    file, index = f"{stem}{addition}.safetensors", f"{single}.index{addition}.json"
    # Where there are both, diffusers looks for the index first and transformers for the file.
    if index in names and (single == DIFFUSERS_WEIGHTS or file not in names):
        end = re.escape(addition)
        shard = rf"{re.escape(stem)}(?:{end}-{_SHARD}|-{_SHARD}{end})\.safetensors"
        return Weights(tuple(sorted(name for name in names if re.fullmatch(shard, name))), index, variant)
    return Weights((file,), None, variant) if file in names else None


def _instead(names: Collection[str]) -> str:
    """Return what a folder without weights holds, as a part of a sentence."""
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if pickles:
        return f", and {pickles[0]} is a pickle, which could run code and is not loaded"
    return f", and {others[0]} has another name" if others else ""


def weights_in(folder: Path, single: str) -> Weights:
    """Return the weights that are loaded from a folder; see :func:`choose_weights`.

    Raises:
        UserError: there are none, or the index is malformed or names a file that is not there.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    weights = choose_weights(names, single, str(folder))
    if weights.index is None:
        return weights
    # Plain names alone: diffusers would unpickle a shard of another kind.
    files = sorted(set(read_json(folder / weights.index, INDEX)["weight_map"].values()))
    missing = [name for name in files if name not in names]
    if missing:
        raise UserError(
            f"{folder / weights.index} names {missing[0]}, which is not there; download the model again."
        )
    return Weights(tuple(files), weights.index, weights.variant)


def autoencoder_parts(names: Collection[str]) -> Parts:
    """Return the part of an autoencoder's repository, or of a pipeline's, that an autoencoder is loaded from."""
    return {"vae": DIFFUSERS_WEIGHTS} if _has_folder(names, "vae") else {"": DIFFUSERS_WEIGHTS}


def text_encoder_parts(names: Collection[str], dropped: Sequence[str] = ()) -> Parts:
    """Return the parts that text encoders are loaded from: those of an SD3 pipeline, or one encoder of transformers.

    Args:
        dropped: encoders of SD3 whose weights are not loaded.
    """
    if MODEL_INDEX not in names:
        return {"": TRANSFORMERS_WEIGHTS}
    parts: Parts = {"": None}
    for name, end in SD3_ENCODERS.items():
        if _has_folder(names, f"text_encoder{end}"):
            parts[f"text_encoder{end}"] = None if name in dropped else TRANSFORMERS_WEIGHTS
        if _has_folder(names, f"tokenizer{end}"):
            parts[f"tokenizer{end}"] = None
    return parts


def pipeline_parts(names: Collection[str]) -> Parts:
    """Return the parts that a whole pipeline is loaded from."""
    parts: Parts = {"": None, "transformer": DIFFUSERS_WEIGHTS, "scheduler": None}
    if _has_folder(names, "vae"):
        parts["vae"] = DIFFUSERS_WEIGHTS
    return parts | text_encoder_parts({*names, MODEL_INDEX})


def transformer_parts(names: Collection[str]) -> Parts:
    """Return the parts that an import needs: of a pipeline the transformer's weights, and what the others say of themselves."""
    if not _has_folder(names, "transformer"):
        return {"": DIFFUSERS_WEIGHTS}
    of_pipeline = pipeline_parts(names)
    return {folder: of_pipeline[folder] if folder == "transformer" else None for folder in of_pipeline}


def judge_parts(names: Collection[str]) -> Parts:
    """Return the part of a model of transformers that judges images."""
    return {"": TRANSFORMERS_WEIGHTS}


def _has_folder(names: Collection[str], folder: str) -> bool:
    return any(name.startswith(f"{folder}/") for name in names)


def needed_files(names: Collection[str], parts: Parts, where: str) -> list[str]:
    """Return the files of a model's parts: their weights, and the small files beside them.

    Raises:
        UserError: a part has no weights that can be loaded.
    """
    needed = []
    for folder, single in parts.items():
        prefix = f"{folder}/" if folder else ""
        here = {
            name.removeprefix(prefix)
            for name in names
            if name.startswith(prefix) and "/" not in name.removeprefix(prefix)
        }
        chosen = {name for name in here if name.endswith(SMALL_FILES)}
        if single is not None:
            chosen |= set(choose_weights(here, single, f"{where}/{folder}" if folder else where).files)
        needed += [prefix + name for name in sorted(chosen)]
    return needed


def loaded_files(folder: Path) -> list[str]:
    """Return the names of the files of one part of a model, whatever it is: its weights if it has some, and the small files.

    Raises:
        UserError: there are weights, but none that can be loaded.
    """
    names = {path.name for path in folder.iterdir() if not path.is_dir()}
    stems = {
        single: single.removesuffix(".safetensors") for single in (DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS)
    }
    found = [
        single
        for single, stem in stems.items()
        if any(name.startswith((f"{stem}.", f"{stem}-")) and name.endswith(".safetensors") for name in names)
    ]
    return needed_files(names, {"": found[0] if found else None}, str(folder))


def names_below(folder: Path) -> set[str]:
    """Return the names of the files of a folder and of its folders, relative to it."""
    found = set()
    for path in folder.iterdir():
        found |= {f"{path.name}/{each.name}" for each in path.iterdir()} if path.is_dir() else {path.name}
    return found


def weight_files(folder: Path, choice: Choice) -> list[Path]:
    """Return all files of weights that are loaded of a model in this folder.

    Raises:
        UserError: a part has none, or lacks some.
    """
    parts = choice(names_below(folder))
    return [
        folder / part / name
        for part, single in parts.items()
        if single is not None
        for name in weights_in(folder / part, single).files
    ]


def copy_part(source: Path, target: Path, single: str | None) -> None:
    """Copy the files of a part of a model, and nothing else that lies beside them, into a new folder.

    Weights of a variant lose its name, so that diffusers finds them without being told.

    Raises:
        UserError: one of them cannot be read.
    """
    names = {path.name for path in source.iterdir() if path.name.endswith(SMALL_FILES)}
    weights = weights_in(source, single) if single is not None else Weights(())
    addition = f".{weights.variant}" if weights.variant else ""
    names = {name for name in names if not (single and name.startswith(f"{single}.index"))}
    target.mkdir()
    for name in sorted(names | set(weights.files)):
        plain = name.replace(addition, "", 1) if name in weights.files else name
        with open_regular(source / name) as stream, (target / plain).open("xb") as copy:
            shutil.copyfileobj(stream, copy, 1 << 24)
    if weights.index is not None:
        index = read_json(source / weights.index, INDEX)
        index["weight_map"] = {
            name: file.replace(addition, "", 1) for name, file in index["weight_map"].items()
        }
        (target / f"{single}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
