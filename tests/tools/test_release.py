"""tools/release.py in a repository of its own: nothing changes without --tag, and what it refuses it says."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import release
import yaml

ROOT = Path(release.__file__).parent.parent


def git(repository: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=repository, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """What a release is made of, committed."""
    folder = tmp_path / "repository"
    for name in ("rmoe_megatron", ".github"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "tools/constraints.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / release.CHANGELOG).write_text("# Changes\n\n## Unreleased\n\n- Circles are rounder.\n")
    (folder / ".gitignore").write_text("/dist/\n")
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "config", "user.name", "A releaser")
    git(folder, "config", "user.email", "releaser@example.org")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "first")
    return folder


def test_a_release_is_a_commit_a_tag_and_a_wheel_that_runs(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = git(repository, "rev-parse", "HEAD")
    assert release.main(["9.8.7", "--offline"], repository) == 0
    said = capsys.readouterr().out
    assert "rmoe_megatron-9.8.7-py3-none-any.whl was built" in said
    assert "- Circles are rounder." in said
    assert git(repository, "rev-parse", "HEAD") == before
    assert git(repository, "status", "--porcelain") == git(repository, "tag") == ""
    assert not (repository / "dist").exists()

    assert release.main(["9.8.7", "--offline", "--tag"], repository) == 0
    assert "Nothing was sent" in capsys.readouterr().out
    assert git(repository, "rev-parse", "HEAD~1") == before
    assert git(repository, "describe") == "v9.8.7"
    assert git(repository, "for-each-ref", "--format=%(contents)", "refs/tags/v9.8.7").startswith("9.8.7\n")
    assert 'version = "9.8.7"' in (repository / "pyproject.toml").read_text()
    changes = (repository / release.CHANGELOG).read_text().splitlines()
    assert changes[2] == "## Unreleased"
    assert changes[4].startswith("## 9.8.7 (20")
    assert changes[6] == "- Circles are rounder."
    cited = yaml.safe_load((repository / release.CITATION).read_text())
    assert (str(cited["version"]), cited["cff-version"]) == ("9.8.7", "1.2.0")
    assert cited["date-released"] == changes[4].split("(")[1].rstrip(")")
    assert {"message", "title", "authors", "license"} <= cited.keys()
    wheel = zipfile.ZipFile(repository / "dist" / "rmoe_megatron-9.8.7-py3-none-any.whl")
    assert "rmoe_megatron/py.typed" in wheel.namelist()

    assert release.main(["9.8.7", "--offline"], repository) == 2
    assert "The tag v9.8.7 is there already" in capsys.readouterr().err
    assert release.main(["9.9.0", "--offline"], repository) == 2
    assert "says of no change" in capsys.readouterr().err


def test_what_cannot_be_released_is_said(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for version, words in (
        ("one", "'one' is no version"),
        ("0.0.1", "0.0.1 is older than"),
    ):
        assert release.main([version], repository) == 2
        assert words in capsys.readouterr().err
    (repository / "README.md").write_text("changed")
    assert release.main(["9.8.7"], repository) == 2
    assert "1 files are not committed, README.md first" in capsys.readouterr().err


def test_a_wheel_without_a_file_of_the_package_is_refused(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = repository / "pyproject.toml"
    found = 'include = ["rmoe_megatron*"]'
    project.write_text(project.read_text().replace(found, f'{found}\nexclude = ["rmoe_megatron.planning*"]'))
    git(repository, "commit", "--quiet", "--all", "--message", "forget a file")
    assert release.main(["9.8.7", "--offline"], repository) == 2
    assert "The wheel lacks rmoe_megatron/planning/" in capsys.readouterr().err
