"""tools/environment.sh finds a Python or says how to get one."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bare_machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine without any Python: only what the script itself calls is on the PATH."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "cat", "dirname", "sha256sum"):
        (tools / name).symlink_to(shutil.which(name))  # type: ignore[arg-type]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RMOE_", "PYENV_"))}
    return {**kept, "PATH": str(tools), "HOME": str(tmp_path), "RMOE_VENV": str(tmp_path / "venv")}


def source(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"source {ROOT}/tools/environment.sh"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def write_python(path: Path, works: bool) -> None:
    """A stand-in for Python that answers as a supported version does, or fails as a pyenv shim can."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"#!{shutil.which('bash')}\n[[ $1 == --version ]] && echo Python 3.12.9\nexit {int(not works)}\n"
    )
    path.chmod(0o755)


def test_no_python_names_three_ways_to_get_one(bare_machine: dict[str, str]) -> None:
    result = source(bare_machine)
    assert result.returncode == 2
    for way in ("apt-get install", "pyenv install", "uv python install", "RMOE_PYTHON"):
        assert way in result.stderr
    assert not Path(bare_machine["RMOE_VENV"]).exists()


def test_a_named_python_that_does_not_work_is_refused(bare_machine: dict[str, str]) -> None:
    result = source({**bare_machine, "RMOE_PYTHON": "/nowhere/python"})
    assert result.returncode == 2
    assert "RMOE_PYTHON=/nowhere/python" in result.stderr


def test_a_failing_shim_is_passed_over_for_an_inactive_version(
    bare_machine: dict[str, str], tmp_path: Path
) -> None:
    write_python(tmp_path / "bin" / "python3.12", works=False)
    inactive = tmp_path / ".pyenv" / "versions" / "3.12.9" / "bin" / "python"
    write_python(inactive, works=True)
    result = source(bare_machine)
    assert f"with {inactive} (Python 3.12.9)" in result.stdout


def test_an_environment_of_another_version_is_made_anew(bare_machine: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "rm").symlink_to(shutil.which("rm"))  # type: ignore[arg-type]
    write_python(tmp_path / "bin" / "python3.12", works=True)
    venv = tmp_path / "venv"
    write_python(venv / "bin" / "python", works=False)
    (venv / "pyvenv.cfg").write_text("")
    result = source(bare_machine)
    assert "Setting up" in result.stdout and not venv.exists()
    write_python(venv / "bin" / "python", works=True)
    (venv / "pyvenv.cfg").write_text("")
    result = source(bare_machine)
    assert f"Updating {venv} (Python 3.12.9)" in result.stdout and venv.exists()
