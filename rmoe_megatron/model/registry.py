"""Which families and additions there are: the one place where a new one is named."""

from collections.abc import Iterator
from typing import Any

from rmoe_megatron.config.model import Architecture, ModelDescription
from rmoe_megatron.model.addition import Addition
from rmoe_megatron.model.dit.family import DiTFamily
from rmoe_megatron.model.family import Family
from rmoe_megatron.model.lora.addition import LoraAddition
from rmoe_megatron.model.mmdit.family import MMDiTFamily
from rmoe_megatron.model.recurrence.addition import RecurrenceAddition

FAMILIES: dict[Architecture, Family] = {Architecture.mmdit: MMDiTFamily(), Architecture.dit: DiTFamily()}
ADDITIONS: tuple[Addition[Any], ...] = (RecurrenceAddition(), LoraAddition())


def family_of(description: ModelDescription) -> Family:
    """Return the family of a model."""
    return FAMILIES[description.model.architecture]


def additions_of(description: ModelDescription) -> Iterator[tuple[Addition[Any], Any]]:
    """Iterate over what a model has of additions, each with its section of the configuration."""
    for addition in ADDITIONS:
        section = addition.section(description)
        if section is not None:
            yield addition, section


def addition_in(description: ModelDescription, layer: int) -> tuple[Addition[Any], Any] | None:
    """Return what is added to block ``layer``, with its section of the configuration."""
    return next((each for each in additions_of(description) if layer in each[1].layers), None)


def depth_of(description: ModelDescription) -> int:
    """Return the number of loops of a model, or of the latent steps of one without a loop; 1 for one without either."""
    if description.loop is not None:
        return description.loop.times
    return description.recurrence.steps if description.recurrence is not None else 1


def is_addition(name: str) -> bool:
    """Whether a parameter of this name belongs to an addition, which a base model need not have."""
    return any(f".{addition.name}." in name for addition in ADDITIONS)
