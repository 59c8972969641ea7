"""Which extra of this package a missing module belongs to, read from what the installed package says of itself."""

import importlib.metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = "rmoe-megatron"


def extra_of(module: str) -> tuple[str, str] | None:
    """Return the extra and the distribution that bring a module, None where no extra does or the base install has it.

    Args:
        module: dotted name, as ``ModuleNotFoundError.name`` has it. A distribution is called like its top-level module,
            with dashes for underscores, or adds a word to it (``megatron-core``).
    """
    top = canonicalize_name(module.partition(".")[0])
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:  # run from its folder without being installed
        return None
    requirements = [Requirement(text) for text in package.requires or []]
    if any(_is_of(each, "") and each.name == top for each in requirements):  # torch is not torch-fidelity
        return None
    for extra in package.metadata.get_all("Provides-Extra") or []:
        for each in requirements:
            name = canonicalize_name(each.name)
            # The dev extra brings the train extra by this package's own name.
            if name == PACKAGE or not _is_of(each, extra) or _is_of(each, ""):
                continue
            if top and (name == top or name.startswith(f"{top}-")):
                return extra, each.name
    return None


def _is_of(requirement: Requirement, extra: str) -> bool:
    """Return whether an installation with an extra, or with none, has a requirement."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})
