"""Inputs of every command that writes."""

from pathlib import Path

import pytest

from tests.support.writing_commands import make_all_inputs


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which commands are given; they write below its ``w``."""
    folder = tmp_path_factory.mktemp("here").resolve()
    make_all_inputs(folder)
    return folder
