"""Every test here submits jobs to a real SLURM that it brings up on this host."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import local_slurm
from tests.support.local_slurm import LocalSlurm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    missing = pytest.mark.skip(reason="slurmctld, slurmd or munged is missing: apt-get install slurm-wlm")
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            if not local_slurm.is_installed():
                item.add_marker(missing)


@pytest.fixture(scope="module")
def slurm() -> Iterator[LocalSlurm]:
    # Not pytest's folder: a path to a socket may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = local_slurm.start(folder)
    yield cluster
    local_slurm.stop(cluster)
    shutil.rmtree(folder)
