"""Everything of a run that changes while it trains."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rmoe_megatron.checkpoint.run_checkpoint import Progress
from rmoe_megatron.engine.protocol import Engine
from rmoe_megatron.training.ema import ExponentialMovingAverage


@dataclass
class TrainingState:
    """Everything that changes while training, as :mod:`rmoe_megatron.checkpoint.run_checkpoint` saves and loads it."""

    engine: Engine
    ema: ExponentialMovingAverage
    progress: Progress
    base_fingerprint: str | None = None  # of the frozen weights, which checkpoints leave out

    def complete_tensors(self) -> list[tuple[str, Tensor]]:
        """Bring the averages together, and return this rank's weights and averages, named; every rank takes part."""
        self.ema.complete()
        return [*self.engine.parameters.items(), *self.ema.averages.items()]

    def sharded_state_dict(self, is_loading: bool) -> dict[str, Any]:
        """Describe the weights, their averages and the optimizer to dist_checkpointing.

        Args:
            is_loading: the description names where loaded values go.
        """
        return self.engine.sharded_state(self.ema.averages, is_loading)

    def take_over(self, loaded: dict[str, Any]) -> None:
        """Take over what was loaded into :meth:`sharded_state_dict`."""
        self.engine.load_state(loaded, self.ema.averages)
