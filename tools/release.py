"""Makes a release: a version, its changes, a wheel that was tried in an empty environment, and a tag.

    python tools/release.py 0.2.0          # does all of it in a temporary clone, says what came out, and changes nothing
    python tools/release.py 0.2.0 --tag    # then takes the commit and its tag over into this repository, and the wheel into dist/

The changes are what stands below ``## Unreleased`` in ``.github/CHANGELOG.md``. The empty environment gets the wheel and the pinned versions of
what it needs from the package index; with ``--offline`` it sees the packages of this environment instead. Nothing is sent
anywhere: the last lines say what to push.
"""

import argparse
import datetime
import hashlib
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from packaging.version import InvalidVersion, Version

from rmoe_megatron.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "rmoe_megatron"
CHANGELOG = ".github/CHANGELOG.md"
CITATION = ".github/CITATION.cff"
UNRELEASED = "## Unreleased\n"
VERSION = re.compile(r'^version = "([^"]*)"$', re.MULTILINE)


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command and return its standard output; the package is not looked for in this folder.

    Raises:
        UserError: it failed; the end of its standard error follows.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [str(each) for each in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    if found.returncode != 0:
        called = " ".join(Path(str(each)).name for each in command[:4])
        raise UserError(
            f"`{called} ...` failed with exit code {found.returncode}; it said: {found.stderr.strip()[-2000:]}"
        )
    return found.stdout


def check(root: Path, asked: str) -> None:
    """Check that a version can be released from what is committed here.

    Raises:
        UserError: it is none or not newer, there are changes that are not committed, or nothing is said to have changed.
    """
    try:
        version = Version(asked)
    except InvalidVersion as error:
        raise UserError(f"{asked!r} is no version; give one like 0.2.0.") from error
    current = VERSION.search((root / "pyproject.toml").read_text())
    if current is None:
        raise UserError(f'{root / "pyproject.toml"} has no line `version = "..."`; add one.')
    if version < Version(current[1]):
        raise UserError(f"{asked} is older than {current[1]} in pyproject.toml; give a newer version.")
    if run("git", "tag", "--list", f"v{version}", cwd=root).strip():
        raise UserError(f"The tag v{version} is there already; give a newer version.")
    if changed := run("git", "status", "--porcelain", cwd=root).splitlines():
        raise UserError(
            f"{len(changed)} files are not committed, {changed[0].split()[-1]} first; commit or remove them."
        )
    if not unreleased_changes(root):
        raise UserError(
            f"{CHANGELOG} says of no change below `{UNRELEASED.strip()}`; write what a user has to know."
        )


def unreleased_changes(root: Path) -> str:
    """Return what the changelog says below its first heading, up to the next one."""
    _, found, rest = (root / CHANGELOG).read_text().partition(UNRELEASED)
    return rest.partition("\n## ")[0].strip() if found else ""


def write_version(root: Path, version: str, date: str) -> None:
    """Write a version into the project's file, the changelog and the citation."""
    project, changelog, citation = (root / name for name in ("pyproject.toml", CHANGELOG, CITATION))
    project.write_text(VERSION.sub(f'version = "{version}"', project.read_text(), count=1))
    changelog.write_text(
        changelog.read_text().replace(UNRELEASED, f"{UNRELEASED}\n## {version} ({date})\n", 1)
    )
    text = re.sub(r"^version: .*$", f"version: {version}", citation.read_text(), flags=re.MULTILINE)
    citation.write_text(re.sub(r"^date-released: .*$", f'date-released: "{date}"', text, flags=re.MULTILINE))


def build_wheel(root: Path, folder: Path) -> Path:
    """Build the wheel of what is committed in ``root`` and check that it holds every file of the package and no other.

    Raises:
        UserError: it could not be built, or names a file that is missing or too much.
    """
    python = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*python, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, root, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    tracked = run("git", "ls-files", PACKAGE, cwd=root).splitlines()
    expected = {name for name in tracked if name.endswith((".py", ".typed"))}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(f"{PACKAGE}/")}
    for name in sorted(expected ^ packed):
        what = "lacks" if name in expected else "holds what is not committed:"
        raise UserError(f"The wheel {what} {name}; correct [tool.setuptools] in pyproject.toml.")
    return wheel


def try_wheel(wheel: Path, version: str, constraints: Path, offline: bool, folder: Path) -> None:
    """Install a wheel where nothing else is, and run what it installs.

    Args:
        offline: what the wheel needs is this environment's, not the package index's.
        folder: an empty one.

    Raises:
        UserError: it cannot be installed, or what it installs does not run.
    """
    environment = folder / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=folder)
    python = environment / "bin" / "python"
    needed = ("--no-deps", "--no-index") if offline else ("--constraint", constraints)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", *needed, wheel, cwd=folder)
    if offline:
        (packages,) = environment.glob("lib/python*/site-packages")
        (packages / "packages_of_the_release.pth").write_text("\n".join(site.getsitepackages()))
    found = run(environment / "bin" / "rmoe", "--version", cwd=folder)
    if version not in re.split(r"[\s,]+", found):
        raise UserError(f"The wheel of {version} installs an rmoe that calls itself {found.strip()!r}.")
    run(environment / "bin" / "rmoe", "sample", "--help", cwd=folder)
    place = run(python, "-c", f"import {PACKAGE}.hf as hf; print(hf.__file__)", cwd=folder).strip()
    if not Path(place).is_relative_to(environment):
        raise UserError(f"The wheel was not what ran: {PACKAGE} came from {place}.")


def release(root: Path, version: str, date: str, tag: bool, offline: bool) -> None:
    """Release what is committed in ``root``.

    Args:
        tag: take commit, tag and wheel over; otherwise nothing changes.

    Raises:
        UserError: says what stands in the way.
    """
    check(root, version)
    changes = unreleased_changes(root)
    with tempfile.TemporaryDirectory() as name:
        clone, built, tried = (Path(name) / part for part in ("clone", "built", "tried"))
        built.mkdir()
        tried.mkdir()
        run("git", "clone", "--quiet", root, clone, cwd=root)
        for setting in ("user.name", "user.email"):
            known = subprocess.run(
                ["git", "config", setting], cwd=root, capture_output=True, text=True
            ).stdout
            if known.strip():
                run("git", "config", setting, known.strip(), cwd=clone)
        write_version(clone, version, date)
        run(
            "git",
            "commit",
            "--quiet",
            "--all",
            "--message",
            f"[release] name this version {version}",
            cwd=clone,
        )
        run("git", "tag", "--annotate", f"v{version}", "--message", f"{version}\n\n{changes}", cwd=clone)
        wheel = build_wheel(clone, built)
        try_wheel(wheel, version, clone / "tools" / "constraints.txt", offline, tried)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        print(f"{wheel.name} was built ({digest}) and runs in an empty environment.")
        print(f"Changes of {version}:\n\n{changes}\n")
        if not tag:
            print("Nothing was changed here; run the same command with --tag to release it.")
            return
        run("git", "fetch", "--quiet", clone, f"refs/tags/v{version}:refs/tags/v{version}", cwd=root)
        run("git", "merge", "--quiet", "--ff-only", f"v{version}", cwd=root)
        (root / "dist").mkdir(exist_ok=True)
        shutil.copy2(wheel, root / "dist" / wheel.name)
    print(
        f"The tag v{version} is set and dist/{wheel.name} is the wheel. Nothing was sent; what is to be sent:"
    )
    print(f"  git push origin HEAD v{version}\n  python -m twine upload dist/{wheel.name}")


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Release; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("version", help="of the release, for instance 0.2.0")
    parser.add_argument("--tag", action="store_true", help="take the commit, its tag and the wheel over")
    parser.add_argument(
        "--offline", action="store_true", help="try the wheel with this environment's packages"
    )
    asked = parser.parse_args(arguments)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    try:
        release(root, asked.version, today, asked.tag, asked.offline)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
