"""Which process of a job this is: rank and size as torchrun says them; without it a job has one process."""

import os

from rmoe_megatron.errors import UserError

MAX_RANKS = 1 << 20


def world_size() -> int:
    """Return the number of ranks.

    Raises:
        UserError: WORLD_SIZE is no such number, or the variables that say where the ranks meet are missing.
    """
    size = _variable("WORLD_SIZE", default=1, least=1, most=MAX_RANKS)
    if size > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise UserError(
                    f"WORLD_SIZE is {size} but {name} is not set; start several ranks with torchrun, or unset WORLD_SIZE."
                )
        _variable("MASTER_PORT", default=0, least=1, most=65535)
    return size


def rank() -> int:
    """Return this process's number among all.

    Raises:
        UserError: RANK is no number below WORLD_SIZE.
    """
    return _variable("RANK", default=0, least=0, most=world_size() - 1)


def local_rank() -> int:
    """Return this process's number among those of its host, which picks its GPU.

    Raises:
        UserError: LOCAL_RANK is no number below WORLD_SIZE.
    """
    return _variable("LOCAL_RANK", default=0, least=0, most=world_size() - 1)


def ranks_on_host() -> int:
    """Return the number of ranks of this host, 1 where torchrun doesn't say it."""
    return _variable("LOCAL_WORLD_SIZE", default=1, least=1, most=world_size())


def speaks() -> bool:
    """Whether this process prints what concerns the whole job; also where the variables are wrong."""
    return os.environ.get("RANK", "0").strip() in ("", "0") or not os.environ["RANK"].isdigit()


def _variable(name: str, default: int, least: int, most: int) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise UserError(
            f"The environment variable {name} is {text[:40]!r}, not a number from {least} to {most}; start the job with "
            "torchrun, or unset it."
        )
    return int(text)
