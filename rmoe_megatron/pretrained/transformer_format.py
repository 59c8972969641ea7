"""How diffusers writes down a family of transformers; each has a file of its own here."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from rmoe_megatron.config.model import ModelDescription, Objective
from rmoe_megatron.errors import UserError


class TransformerFormat(ABC):
    """Classes and configuration of a family in diffusers.

    Attributes:
        stock: diffusers' own class.
        own: this package's subclass, which also has recurrence and what else diffusers' cannot express.
        config: what their config.json may say, a TypedDict that pydantic checks.
        objective: that diffusers' pipelines for this class sample.
    """

    stock: type[ModelMixin]
    own: type[ModelMixin]
    config: type
    objective: Objective

    @abstractmethod
    def arguments(self, description: ModelDescription) -> dict[str, Any]:
        """Return the arguments of either class besides sizes and recurrence; those of ``own`` where they are needed."""

    @abstractmethod
    def model_settings(self, values: dict[str, Any], path: Path, text_length: int) -> dict[str, Any]:
        """Return the keys of the model section that a checked config.json gives, besides sizes.

        Raises:
            UserError: it is of a variant that is not supported.
        """


def require_fixed(path: Path, values: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Refuse a configuration that says something else than what is fixed here."""
    for key, expected in fixed.items():
        if values.get(key, expected) != expected:
            raise UserError(f"{path} has {key} {values[key]}; supported is {expected}.")
