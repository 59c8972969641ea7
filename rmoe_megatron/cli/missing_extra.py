"""Which extra of this package a missing module belongs to, read from what the installed package says of itself."""

import importlib.metadata
import re

PACKAGE = "rmoe-megatron"
# A requirement of an extra as wheels state it, for instance: megatron-core<0.20,>=0.19.2; extra == "train"
_REQUIREMENT = re.compile(r"""(?P<name>[\w.-]+)(?:.*;.*\bextra == ["'](?P<extra>[\w-]+)["'])?""")


def extra_of(module: str) -> tuple[str, str] | None:
    """Return the extra and the distribution that bring a module, None where no extra does or the base install has it.

    Args:
        module: dotted name, as ``ModuleNotFoundError.name`` has it. A distribution is called like its top-level module,
            with dashes for underscores, or adds a word to it (``megatron-core``).
    """
    top = module.partition(".")[0].replace("_", "-").lower()
    try:
        requirements = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:  # run from its folder without being installed
        return None
    matches = [match for each in requirements if (match := _REQUIREMENT.match(each)) is not None]
    if any(
        match["name"] == top for match in matches if match["extra"] is None
    ):  # torch is not torch-fidelity
        return None
    for match in matches:
        if match["extra"] is None or match["name"] == PACKAGE:  # the dev extra brings the train extra by name
            continue
        if match["name"] == top or match["name"].startswith(f"{top}-"):
            return match["extra"], match["name"]
    return None
