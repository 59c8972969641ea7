"""How a model's tensors under diffusers' names lie in those of a file in the layout that the model was published in.

One table serves both ways: an import takes the rows of each diffusers tensor, an export puts the tensors of the file together from them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where a tensor of diffusers lies in a file.

    Attributes:
        source: the file's tensor.
        runs: first and last row (exclusive) of its parts, in the order of diffusers; None is the whole tensor.
    """

    source: str
    runs: tuple[tuple[int, int], ...] | None = None

    def take(self, tensor: Tensor) -> Tensor:
        """Return the tensor of diffusers out of the file's."""
        return tensor if self.runs is None else torch.cat([tensor[start:end] for start, end in self.runs])

    def split(self, tensor: Tensor) -> list[tuple[int, Tensor]]:
        """Return the parts of the tensor of diffusers, each with the row of the file's at which it begins."""
        if self.runs is None:
            return [(0, tensor)]
        parts = tensor.split([end - start for start, end in self.runs])
        return [(start, part) for (start, _), part in zip(self.runs, parts, strict=True)]


Layout = Mapping[str, Rows]  # by diffusers' names


def put_together(layout: Layout, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the file by name.

    Args:
        read: returns the tensor under a name of diffusers; of several that are copies of the same rows the first is asked.
    """
    names: dict[str, list[str]] = {}
    for name, rows in layout.items():
        names.setdefault(rows.source, []).append(name)
    for source, parts_of_diffusers in names.items():
        parts: dict[int, Tensor] = {}
        for rows, name in {layout[name]: name for name in reversed(parts_of_diffusers)}.items():
            parts |= rows.split(read(name))
        yield source, torch.cat([part for _, part in sorted(parts.items(), key=lambda item: item[0])])
