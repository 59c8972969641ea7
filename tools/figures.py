"""Writes the figures of the ledger (``tools/ledger.py``) into the pages, and says which of them are stale.

    python tools/figures.py write                   # every page as the records have it
    python tools/figures.py check                   # exit code 1 if a page differs from the records
    python tools/figures.py stale                   # what has changed since each stale record, and the command that renews it
    python tools/figures.py add NAME --command COMMAND --depends-on PATH... FIGURE=VALUE...

``add`` records what a command measured that has no option ``--record`` of its own, such as the scores of a model.

In a page a comment holds the template, and the text that it gives stands behind it:

    <!-- figures: KIND/NAME {dense_over_diffusers:.2f} of the time{stale} -->0.46 of the time<!-- end of figures -->

A template of several lines makes a table: its last line is repeated for every record. Names are separated by commas, and ``*`` in a
name matches several records. Fields are the record's figures, ``command``, ``date``, ``commit``, ``processor``, ``cores``, ``threads``, packages with ``_``
for ``-``, ``measured`` (date, version, and whether the code is older) and ``stale`` (empty, or in brackets when it was measured).
A template names one of the last two, so that no figure outlives its code in silence.
"""

import argparse
import fnmatch
import re
import sys
from pathlib import Path

import ledger
from ledger import Figure, Record

from rmoe_megatron.config.run import Device
from rmoe_megatron.distributed.device import select_device
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic

FOLDERS = (
    ".github",
    "configs",
    "docker",
    "rmoe_megatron",
    "slurm",
    "tools",
)  # that have pages, besides the README
BLOCK = re.compile(r"(<!-- figures: (\S+)\s(.*?)-->)(.*?)(<!-- end of figures -->)", re.DOTALL)


def pages(root: Path = ledger.ROOT) -> list[Path]:
    """Return the pages of the repository."""
    return [root / "README.md", *sorted(page for folder in FOLDERS for page in (root / folder).rglob("*.md"))]


def rendered(text: str, records: dict[str, Record], where: str) -> str:
    """Return a page's text with every template filled in anew.

    Args:
        where: what an error message calls the page.

    Raises:
        UserError: a template matches no record, names a figure that a record lacks, or does not say when it was measured.
    """

    def fill(block: re.Match[str]) -> str:
        opening, names, template, _, closing = block.groups()
        if "{stale}" not in template and "{measured}" not in template:
            raise UserError(
                f"{where}: the figures of {names} do not say when they are stale; add {{stale}} or {{measured}}."
            )
        found = _matching(records, names, where)
        *head, row = template.strip().splitlines()
        lines = head + [_filled(row, records[name], f"{where}: {name}") for name in found]
        content = "\n" + "\n".join(lines) + "\n" if head else " ".join(lines)
        return f"{opening}{content}{closing}"

    return BLOCK.sub(fill, text)


def describe_stale(records: dict[str, Record]) -> list[str]:
    """Return two lines and the reasons for every stale record."""
    lines = []
    for name, record in records.items():
        if reasons := ledger.why_stale(record):
            lines.append(f"{name}, measured {record['date']} at {record['commit'][:7]}: {'; '.join(reasons)}")
            lines.append(f"  renewed by: {record['command']}")
    return lines


def main() -> None:
    """Write, check, list or add."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    for action in ("write", "check", "stale"):
        actions.add_parser(action)
    add = actions.add_parser("add")
    add.add_argument("name")
    add.add_argument("--command", required=True)
    add.add_argument("--depends-on", nargs="+", required=True, help="files and folders of the repository")
    add.add_argument("--figures", nargs="+", required=True, metavar="FIGURE=VALUE")
    add.add_argument("--note", default="")
    arguments = parser.parse_args()
    try:
        sys.exit(_run(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.action == "add":
        place = ledger.machine(select_device(Device.auto))
        figures = dict(_figure(text) for text in arguments.figures)
        record = ledger.make(arguments.command, place, figures, arguments.depends_on, arguments.note)
        print(f"recorded in {ledger.save(ledger.RECORDS, arguments.name, record)}")
        return 0
    records = ledger.load()
    if arguments.action == "stale":
        print("\n".join(describe_stale(records)) or "No record is stale.")
        return 0
    differ = []
    for page in pages():
        text = page.read_text()
        if (new := rendered(text, records, str(page.relative_to(ledger.ROOT)))) != text:
            differ.append(str(page.relative_to(ledger.ROOT)))
            if arguments.action == "write":
                atomic.write(page, new)
    if arguments.action == "write":
        print(f"{len(differ)} pages changed: {', '.join(differ) or 'none'}")
        return 0
    if differ:
        print(
            f"{', '.join(differ)} differ from the ledger; run python tools/figures.py write.", file=sys.stderr
        )
    return 1 if differ else 0


def _matching(records: dict[str, Record], names: str, where: str) -> list[str]:
    found = []
    for pattern in names.split(","):
        matches = fnmatch.filter(records, pattern)
        if not matches:
            raise UserError(f"{where}: no record of the ledger is called {pattern}; see tools/records.")
        found += matches
    return found


def _filled(template: str, record: Record, where: str) -> str:
    versions = {package.replace("-", "_"): number for package, number in record["versions"].items()}
    since = f"{record['date']}, torch {record['versions']['torch']}"
    stale = bool(ledger.why_stale(record))
    fields: dict[str, Figure] = {
        **versions,
        "command": record["command"],
        "commit": record["commit"][:7],
        "date": record["date"],
        "processor": record["machine"]["processor"],
        "cores": record["machine"]["cores"],
        "threads": record["machine"]["threads"],
        "note": record["note"],
        "measured": f"{since}; the code has changed since" if stale else since,
        "stale": f" (measured {since}; the code has changed since)" if stale else "",
        **record["figures"],
    }
    try:
        return template.format_map(fields)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"{where}: the template {template!r} cannot be filled in ({error}); it has {', '.join(fields)}."
        ) from error


def _figure(text: str) -> tuple[str, Figure]:
    name, equals, value = text.partition("=")
    if not name.isidentifier() or not equals:
        raise UserError(f"{text} is no figure; write NAME=VALUE.")
    try:
        return name, int(value) if re.fullmatch(r"-?\d+", value) else float(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    main()
