"""What can be asked of an engine before it is built, without importing its library."""

from abc import ABC, abstractmethod

from torch import nn

from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.engine.protocol import Engine


class EngineKind(ABC):
    """One kind of engine; each has a folder of its own and one entry in :mod:`rmoe_megatron.engine.registry`."""

    libraries: str  # whose layers and update a run has, as the start of a run says it

    @abstractmethod
    def check(self, config: RunConfig, world_size: int) -> None:
        """Check that the engine's libraries are here, and take the options on ``world_size`` ranks.

        Raises:
            UserError: they do not; names the option that is wrong.
            ModuleNotFoundError: a package is not installed; the command line says which extra brings it.
        """

    @abstractmethod
    def shards_gradients(self, config: RunConfig) -> bool:
        """Whether a rank keeps only a part of the gradients of its parameters."""

    @abstractmethod
    def describe_adam(self, config: RunConfig, on_cuda: bool) -> str:
        """Say whose Adam the engine takes, and why not another's."""

    @abstractmethod
    def build(self, config: RunConfig, modules: nn.ModuleList, loss: DiffusionLoss) -> Engine:
        """Return the engine that trains ``modules``: this rank's part of the model, on its device, frozen where it is."""
