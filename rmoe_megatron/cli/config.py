"""The command ``rmoe config``: every key of a run's configuration, for people and for editors."""

import json
from typing import Annotated

import typer

from rmoe_megatron.errors import UserError


def config_command(
    key: Annotated[
        str | None,
        typer.Argument(
            metavar="[KEY]", help="Show this key, or all keys of this section. The default is everything."
        ),
    ] = None,
    schema: Annotated[
        bool,
        typer.Option(
            "--schema", help="Print a JSON schema instead, which an editor completes and checks by."
        ),
    ] = False,
) -> None:
    """Show the keys of a configuration with type, bounds, default and meaning."""
    from rmoe_megatron.config import reference

    if schema and key is not None:
        raise UserError("--schema is of the whole configuration; leave the key out.")
    found = reference.find_keys(key)
    if schema:
        print(
            json.dumps(
                {"$schema": "https://json-schema.org/draft/2020-12/schema"} | reference.schema(), indent=1
            )
        )
        return
    for each in found:
        print(each)
