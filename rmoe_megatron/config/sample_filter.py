"""A small language that says which samples to take: ``data.filter``.

``width >= 512 and aesthetic > 5 and not (watermark > 0.8 or language != "en")``: comparisons of names, numbers and texts, joined
by and, or, not and parentheses. It is parsed as Python is, and only these parts of it are known; nothing is evaluated.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from rmoe_megatron.errors import UserError

Value = float | str | bool
Test = Callable[[Mapping[str, Any]], bool]
MAX_LENGTH = 2000

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip


class SampleFilter:
    """Whether a sample is taken, by what is known of it.

    Args:
        text: an expression.

    Attributes:
        names: that it asks for.

    Raises:
        UserError: the text is no filter; says which part is unknown.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.names: set[str] = set()
        try:
            if len(text) > MAX_LENGTH:
                raise ValueError(f"it is longer than {MAX_LENGTH} characters")
            self._test = self._condition(ast.parse(text, mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else str(error) or "it is too deep"
            raise UserError(
                f"data.filter {text!r:.100} is no condition ({reason}); write comparisons like width >= 512, joined by and, "
                "or, not and parentheses."
            ) from error

    def takes(self, values: Mapping[str, Any]) -> bool:
        """Whether a sample of these values is taken.

        A comparison with a name that the sample lacks, or with a value of another type, does not hold.
        """
        return self._test(values)

    def __reduce__(self) -> tuple[type["SampleFilter"], tuple[str]]:
        return SampleFilter, (self.text,)

    def _condition(self, node: ast.expr) -> Test:
        if isinstance(node, ast.BoolOp):
            tests = [self._condition(each) for each in node.values]
            together = all if isinstance(node.op, ast.And) else any
            return lambda values: together(test(values) for test in tests)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self._condition(node.operand)
            return lambda values: not inner(values)
        if isinstance(node, ast.Compare):
            return self._comparison(node)
        raise ValueError(f"{ast.unparse(node)[:60]!r} is no comparison")

    def _comparison(self, node: ast.Compare) -> Test:
        sides = [self._operand(each) for each in (node.left, *node.comparators)]
        if any(type(each) not in _COMPARISONS for each in node.ops):
            raise ValueError(
                f"{ast.unparse(node)[:60]!r} compares by something else than <, <=, >, >=, ==, !="
            )
        compare = [_COMPARISONS[type(each)] for each in node.ops]

        def holds(values: Mapping[str, Any]) -> bool:
            found = [side(values) for side in sides]
            pairs = zip(compare, found, found[1:], strict=False)
            return all(_comparable(left, right) and each(left, right) for each, left, right in pairs)

        return holds

    def _operand(self, node: ast.expr) -> Callable[[Mapping[str, Any]], Any]:
        if isinstance(node, ast.Name):
            name = node.id
            self.names.add(name)
            return lambda values: values.get(name)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            number = node.operand
            if isinstance(number, ast.Constant) and type(number.value) in (int, float):
                negative = -number.value  # type: ignore[operator]
                return lambda _: negative
        if isinstance(node, ast.Constant) and type(node.value) in (int, float, str, bool):
            constant = node.value
            return lambda _: constant
        raise ValueError(f"{ast.unparse(node)[:60]!r} is no name, number or text")


def _comparable(left: Any, right: Any) -> bool:
    numbers = (int, float)
    if isinstance(left, bool) or isinstance(right, bool):
        return isinstance(left, bool) and isinstance(right, bool)
    both_numbers = isinstance(left, numbers) and isinstance(right, numbers)
    return both_numbers or (isinstance(left, str) and isinstance(right, str))
