"""What an engine does. Each has a folder of its own and one line in :mod:`rmoe_megatron.engine.registry`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rmoe_megatron.data.batch import Batch, Conditions
from rmoe_megatron.engine.suspects import Suspect


@dataclass
class StepResult:
    """What one optimizer step did; the loss is the mean over the global batch.

    If loss or gradient norm is not finite, the weights are left alone and ``suspects`` are the samples that may have
    spoilt the step; else it is None.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    suspects: list[Suspect] | None = None


@dataclass(frozen=True)
class MainWeight:
    """What this rank keeps of the float32 weight behind a parameter of fewer bits, which is that weight rounded.

    Attributes:
        start: where ``values``, flat float32, begin in the flattened parameter.
        group: the ranks that keep the rest; None if all of it is here.
    """

    start: int
    values: Tensor
    group: ProcessGroup | None


class Engine(Protocol):
    """Trains, evaluates and asks one model. Every rank calls every method.

    Attributes:
        modules: what this rank has of the model.
        parameters: this rank's parts of the trained parameters, by their names in ``modules``; what is written into them
            between the other calls is what the model then has.
    """

    modules: nn.ModuleList
    parameters: dict[str, Tensor]

    def step(
        self,
        micro_batches: list[Batch],
        before_update: Callable[[], None] = lambda: None,
        watches_gates: bool = False,
    ) -> StepResult:
        """Update the weights by this rank's micro-batches of one step, as many as every other data-parallel rank's.

        Args:
            micro_batches: each has as many samples and tokens as the one at its place on the other ranks; with pipeline parallelism all of
                them of one size.
            before_update: called when the gradients are there. With overlapped gathering, parameters of the previous update may still
                arrive during the forward pass; here they are complete.
            watches_gates: what the gates decide is recorded for :meth:`routing_metrics`; every rank says the same.
        """
        ...

    def evaluate(self, micro_batches: list[Batch]) -> float:
        """Return the mean loss of all ranks' micro-batches without updating anything; they are as those of a step."""
        ...

    def denoise(self, latents: Tensor, timestep: Tensor, rng_keys: Tensor, conditions: Conditions) -> Tensor:
        """Return the model's output float32 [B, C or 2 C, height, width] on every rank; every rank gives the same."""
        ...

    def main_weights(self) -> dict[str, MainWeight]:
        """Return the float32 weights that the optimizer updates of ``parameters`` that are not float32; others are their own.

        The values are those of the moment, on the device where the optimizer is.
        """
        ...

    def gather_parameters(self) -> None:
        """Wait until the parameters of the last update have come from the other ranks."""
        ...

    def routing_metrics(self) -> dict[str, float]:
        """Return the load-balancing loss of the last step, and if its gates were watched what they decided.

        Every rank takes part, and waits for it.
        """
        ...

    def state_keys(self) -> dict[str, str]:
        """Return the names in the whole model of what this rank has, by the names in ``modules``."""
        ...

    def sharded_state(self, averages: dict[str, Tensor], is_loading: bool) -> dict[str, Any]:
        """Describe everything that training changes to Megatron-Core's dist_checkpointing; every rank takes part.

        Every engine saves weights and averages under the same keys, as whole tensors of any layout: another engine can
        start from them.

        Args:
            averages: the averages of ``parameters``.
            is_loading: the description names where loaded values go.

        Returns:
            ``model``: the model's weights, or of a partly frozen one the trained ones; ``ema``: the averages, under keys
            that start with ``ema.``; and what else the engine needs to go on: optimizer and schedule.
        """
        ...

    def load_state(self, loaded: dict[str, Any], averages: dict[str, Tensor]) -> None:
        """Take over what was loaded into :meth:`sharded_state`; learning rates and betas stay those of the run.

        Args:
            averages: take those that were loaded.
        """
        ...
