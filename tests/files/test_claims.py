"""Claims on a disk that takes no bytes."""

import errno
import resource
from pathlib import Path

import pytest

from rmoe_megatron.files import claims


def test_an_error_of_writing_names_the_claim(tmp_path: Path) -> None:
    """The system's own error of a write names no file: the sentence about it has to."""
    path = tmp_path / "0.claim"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            claims.take(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert not path.exists()
    assert claims.take(path)
    claims.release(path)
