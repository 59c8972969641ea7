"""YAML as configurations use it: plain values, every key once."""

from typing import Any

import yaml

from rmoe_megatron.errors import UserError


class _PlainLoader(yaml.SafeLoader):
    """Refuses keys that stand twice and aliases, which let a small file stand for an endless one."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.constructor.ConstructorError(
                None, None, f"the alias *{event.anchor} is not supported", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                mark = node.value[position][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", mark)
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str, where: str) -> Any:
    """Return what a YAML text holds: texts, numbers, truth values, lists and mappings.

    Args:
        where: what the error message calls the text, at the start of the sentence.

    Raises:
        UserError: it is no such text.
    """
    try:
        return yaml.load(text, _PlainLoader)
    except RecursionError as error:
        raise UserError(f"{where} is too deeply nested.") from error
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        # Constructors raise ValueError for 2020-99-99 and for numbers of thousands of digits, TypeError for odd keys.
        raise UserError(f"{where} is not valid YAML ({' '.join(str(error).split())}).") from error
