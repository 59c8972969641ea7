"""An exported folder to a repository of the Hugging Face hub, when that is asked for: what is sent, and the sending."""

import os
import re
from pathlib import Path

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.regular import check_regular, check_subfolder
from rmoe_megatron.pretrained.model_files import LORA_WEIGHTS, MODEL_INDEX

_REPOSITORY = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")


def files_to_push(folder: Path, repository: str) -> list[tuple[str, int]]:
    """Return the names of the files of an export that :func:`push` sends, with their sizes; hidden files stay here.

    Raises:
        UserError: the folder is no export, a file of it is a link or none that can be read, or the repository's name is none.
    """
    if _REPOSITORY.fullmatch(repository) is None:
        raise UserError(f"{repository!r:.100} is no repository of the hub; name one as OWNER/NAME.")
    if not (folder / MODEL_INDEX).is_file() and not (folder / LORA_WEIGHTS).is_file():
        raise UserError(
            f"{folder} holds no export (no {MODEL_INDEX} and no {LORA_WEIGHTS}); make one with `rmoe convert to-hf` or `to-lora`."
        )
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        if os.path.isdir(path):  # noqa: PTH112  # of a link, too
            check_subfolder(path, folder)
        else:
            check_regular(path)
            found.append((name.as_posix(), path.stat().st_size))
    return found


def push(folder: Path, repository: str, public: bool = False, endpoint: str | None = None) -> str:
    """Send an export to a repository, which is made if it is not there, private unless asked otherwise; returns its address.

    The token is that of ``hf auth login`` or HF_TOKEN.

    Args:
        public: everybody may see the repository.
        endpoint: address of the hub; None is the one that huggingface_hub knows.

    Raises:
        UserError: the folder is no export, the repository is public and that is not asked for, or the hub refuses.
    """
    names = [name for name, _ in files_to_push(folder, repository)]
    from huggingface_hub import HfApi

    hub = HfApi(endpoint=endpoint)
    try:
        hub.create_repo(repository, private=not public, exist_ok=True)
        is_private = hub.model_info(repository).private
    except Exception as error:  # the hub's own, its client's and the system's
        raise _refused(folder, repository, error) from error
    if not is_private and not public:
        raise UserError(
            f"The repository {repository} is there and public; nothing was sent. Add --public, or name another one."
        )
    try:
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=names,
            commit_message="Export of rmoe_megatron",
        )
    except Exception as error:
        raise _refused(folder, repository, error) from error
    return f"{hub.endpoint}/{repository}"


def _refused(folder: Path, repository: str, error: Exception) -> UserError:
    from rmoe_megatron.files.foreign_errors import reason  # imports PyTorch, which takes seconds

    return UserError(
        f"{folder} cannot be sent to {repository} ({reason(error)}); log in with `hf auth login`, with a token that may write there."
    )
