"""Where a frozen model comes from: a local folder, or a repository of the Hugging Face hub."""

import re
from pathlib import Path

from rmoe_megatron.errors import UserError
from rmoe_megatron.pretrained.model_files import SMALL_FILES, Choice, needed_files, weight_files

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# The small files of a model that is no pipeline. ``*`` would stand for slashes, too.
_SMALL_FILES = [
    "config.json", "model_index.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja",
]  # fmt: skip
_PIPELINE = (
    "transformer", "scheduler", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3",
)  # fmt: skip


def is_repository(name: str) -> bool:
    """Whether a name can be that of a repository of the hub, and is none of a local folder or file."""
    return not Path(name).exists() and _REPOSITORY.fullmatch(name) is not None


def is_of_the_hub(name: str, repository: str) -> bool:
    """Whether a name stands for a repository of the hub: a local folder of the same name is another model."""
    return name == repository and not Path(name).is_dir()


def present_folder(name: str, key: str, choice: Choice) -> Path:
    """Return the folder of a frozen model that can be had without a network: as a folder, or from the hub's cache.

    Args:
        key: the key of the configuration that names the model.
        choice: which parts of it are needed.

    Raises:
        UserError: it is not, or lacks weights; says how to fetch it.
    """
    folder = Path(name)
    if not folder.is_dir():
        if _REPOSITORY.fullmatch(name) is None:
            raise UserError(
                f"There is no folder {name} ({key}); give a local folder or a hub repository (owner/name)."
            )
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except Exception as error:  # the hub raises its own and the file system's errors
            raise UserError(
                f"{name} ({key}) is not in the hub's cache here; run `hf download {name}` where there is a network, "
                "with the same HF_HOME."
            ) from error
    try:
        weight_files(folder, choice)
    except UserError as error:
        raise UserError(f"{str(error).rstrip('.')} ({key}).") from error
    return folder


def model_folder(name: str, choice: Choice) -> Path:
    """Return the local folder of ``name``; of a repository of the hub the files that are needed are downloaded first.

    Args:
        choice: which parts of the model are needed.

    Raises:
        UserError: there is neither such a folder nor such a repository, or it has no weights that can be loaded.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if _REPOSITORY.fullmatch(name) is None:
        raise UserError(f"There is no folder {name}; give a local folder or a hub repository (owner/name).")
    kept = _in_cache(name, choice)
    if kept is not None:
        return kept
    from huggingface_hub import list_repo_files, snapshot_download

    try:
        names = list_repo_files(name)
    except Exception:  # what downloading says of it is clearer
        names = None
    files = needed_files(names, choice(names), name) if names is not None else _patterns(choice)
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the hub raises its own, requests' and the file system's errors
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name} is no local folder and cannot be downloaded from the hub ({reason}); download it first."
        ) from error


def _in_cache(name: str, choice: Choice) -> Path | None:
    """Return the folder of a repository in the hub's cache if it has all weights that are needed."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=_patterns(choice), local_files_only=True))
        weight_files(folder, choice)
    except Exception:  # the hub's own, and those of weights that are not there
        return None
    return folder


def _patterns(choice: Choice) -> list[str]:
    """Return patterns of the files that are needed of a repository whose files are not known."""
    pipeline = ["model_index.json", *(f"{part}/config.json" for part in _PIPELINE)]
    patterns = []
    for names in (pipeline, ["config.json"]):
        for part, single in choice(names).items():
            prefix = f"{part}/" if part else ""
            patterns += [f"{prefix}*{end}" for end in SMALL_FILES] if part else _SMALL_FILES
            if single is not None:
                stem = single.removesuffix(".safetensors")
                patterns += [f"{prefix}{stem}*.safetensors", f"{prefix}{single}.index*.json"]
    return list(dict.fromkeys(patterns))
