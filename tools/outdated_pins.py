"""Says which of the versions in tools/constraints.txt are behind the newest releases, and what holds each of them back.

    python tools/outdated_pins.py

Run it once a week in the environment of tools/environment.sh: pip asks the package index that it is configured with. The exit
code is 1 if a package that pyproject.toml asks for is behind and no other package holds it back, else 0.
"""

import json
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "rmoe-megatron"
CONSTRAINTS = Path(__file__).parent / "constraints.txt"


class Outdated(NamedTuple):
    """A pin that is behind, and the requirements that the newest release does not meet, as ``DISTRIBUTION asks for SPECIFIER``."""

    name: str
    pinned: str
    newest: str
    held_by: list[str]


def read_pins(path: Path) -> dict[str, str]:
    """Return the pinned version of each package."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def newest_releases() -> dict[str, str]:
    """Return the newest version of each installed package that has one, as pip's index says."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "list",
        "--outdated",
        "--format=json",
        "--disable-pip-version-check",
    ]
    listed = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    return {canonicalize_name(each["name"]): each["latest_version"] for each in listed}


def installed_requirements() -> list[tuple[str, Requirement]]:
    """Return (distribution, requirement) of this project with its ``dev`` extra and of all that follows from that."""
    installed = {canonicalize_name(each.metadata["Name"]): each for each in distributions()}
    found: list[tuple[str, Requirement]] = []
    waiting = [(canonicalize_name(PROJECT), extra) for extra in ("", "dev")]
    seen = set[tuple[str, str]]()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen or name not in installed:
            continue
        seen.add((name, extra))
        for requirement in map(Requirement, installed[name].requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                found.append((name, requirement))
                required = canonicalize_name(requirement.name)
                waiting += [(required, each) for each in ("", *requirement.extras)]
    return found


def outdated(
    pins: dict[str, str], newest: dict[str, str], requirements: list[tuple[str, Requirement]]
) -> list[Outdated]:
    """Return the pins that are behind, sorted by name."""
    return [
        Outdated(
            name,
            pinned,
            newest[name],
            sorted(
                {
                    f"{distribution} asks for {requirement.specifier}"
                    for distribution, requirement in requirements
                    if canonicalize_name(requirement.name) == name
                    and not requirement.specifier.contains(newest[name], prereleases=True)
                }
            ),
        )
        for name, pinned in sorted(pins.items())
        if name in newest and newest[name] != pinned
    ]


def main() -> int:
    """Print a line for each pin that is behind; returns 1 if one of this project's own requirements could move."""
    requirements = installed_requirements()
    found = outdated(read_pins(CONSTRAINTS), newest_releases(), requirements)
    own = {canonicalize_name(requirement.name) for name, requirement in requirements if name == PROJECT}
    for pin in found:
        why = "; ".join(pin.held_by) or "nothing asks for less"
        print(f"{pin.name} {pin.pinned} is behind {pin.newest}: {why}")
    others = [
        pin.name for pin in found if pin.name in own and all(why.startswith(PROJECT) for why in pin.held_by)
    ]
    print(
        f"{len(found)} pins are behind; {len(others)} that pyproject.toml asks for could move: {', '.join(others) or 'none'}."
    )
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
