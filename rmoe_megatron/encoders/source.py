"""Where a frozen model comes from: a local folder, or a repository of the Hugging Face hub."""

import re
from pathlib import Path

from rmoe_megatron.errors import UserError

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def present_folder(name: str, key: str) -> Path:
    """Return the folder of a frozen model that can be had without a network: as a folder, or from the hub's cache.

    Args:
        key: of the configuration, that names the model.

    Raises:
        UserError: it is not; says how to fetch it.
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
    if next(folder.rglob("*.safetensors"), None) is None:
        raise UserError(
            f"There are no weights (*.safetensors) in {folder} ({key}); fetch {name} again, whole."
        )
    return folder


def is_of_the_hub(name: str, repository: str) -> bool:
    """Whether a name stands for a repository of the hub: a local folder of the same name is another model."""
    return name == repository and not Path(name).is_dir()


def model_folder(name: str, patterns: list[str]) -> Path:
    """Return the local folder of ``name``; a repository's files that match ``patterns`` are downloaded first.

    Raises:
        UserError: there is neither such a folder nor such a repository.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if _REPOSITORY.fullmatch(name) is None:
        raise UserError(f"There is no folder {name}; give a local folder or a hub repository (owner/name).")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub raises its own, requests' and the file system's errors
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name} is no local folder and cannot be had from the hub ({reason}); download it first."
        ) from error
