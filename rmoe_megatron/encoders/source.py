"""Where a frozen model comes from: a local folder, or a repository of the Hugging Face hub."""

import re
from pathlib import Path

from rmoe_megatron.errors import UserError

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


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
