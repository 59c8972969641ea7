"""Which code this is: a fingerprint of the package's own files, and the versions of the libraries that it computes with."""

import functools
import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).parent
LIBRARIES = (  # that training depends on
    "torch", "triton", "megatron-core", "emerging-optimizers", "deepspeed", "transformer-engine", "diffusers", "transformers",
    "safetensors", "webdataset", "Pillow", "numpy",
)  # fmt: skip
INFERENCE = ("torch", "diffusers", "transformers", "numpy")  # that pictures and verdicts depend on


@functools.cache
def code_fingerprint() -> str:
    """Return sixteen digits that change with any of the package's Python files."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def versions_of(*libraries: str) -> dict[str, str]:
    """Return the version of this package with its fingerprint, and those of libraries that are installed."""
    found = {"rmoe-megatron": f"{_version('rmoe-megatron') or 'not installed'}, code {code_fingerprint()}"}
    for name in libraries:
        number = _version(name)
        if number is not None:
            found[name] = number
    return found


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
