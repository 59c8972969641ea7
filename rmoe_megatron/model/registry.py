"""Which families and adapters there are: the one place where a new one is named."""

from collections.abc import Iterator
from typing import Any

from rmoe_megatron.config.model import Architecture, ModelDescription
from rmoe_megatron.model.adapter import Adapter
from rmoe_megatron.model.dit.family import DiTFamily
from rmoe_megatron.model.family import Family
from rmoe_megatron.model.lora.adapter import LoraAdapter
from rmoe_megatron.model.mmdit.family import MMDiTFamily
from rmoe_megatron.model.recurrence.adapter import RecurrenceAdapter

FAMILIES: dict[Architecture, Family] = {Architecture.mmdit: MMDiTFamily(), Architecture.dit: DiTFamily()}
ADAPTERS: tuple[Adapter[Any], ...] = (RecurrenceAdapter(), LoraAdapter())


def family_of(description: ModelDescription) -> Family:
    """Return the family of a model."""
    return FAMILIES[description.model.architecture]


def adapters_of(description: ModelDescription) -> Iterator[tuple[Adapter[Any], Any]]:
    """Iterate over what a model has of adapters, each with its section of the configuration."""
    for adapter in ADAPTERS:
        section = adapter.section(description)
        if section is not None:
            yield adapter, section


def adapter_in(description: ModelDescription, layer: int) -> tuple[Adapter[Any], Any] | None:
    """Return what is added to block ``layer``, with its section of the configuration."""
    return next((each for each in adapters_of(description) if layer in each[1].layers), None)


def depth_of(description: ModelDescription) -> int:
    """Return the number of loops of a model, or of the latent steps of one without a loop; 1 for one without either."""
    if description.loop is not None:
        return description.loop.times
    return description.recurrence.steps if description.recurrence is not None else 1


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter, which a base model need not have."""
    return any(f".{adapter.name}." in name for adapter in ADAPTERS)
