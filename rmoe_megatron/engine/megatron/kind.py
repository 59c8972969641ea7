"""Megatron-Core's engine before it is built."""

from torch import nn

from rmoe_megatron.config.run import OptimizerName, RunConfig
from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.engine.kind import EngineKind
from rmoe_megatron.engine.protocol import Engine
from rmoe_megatron.model.precision import backend


class MegatronKind(EngineKind):
    """Trains in every parallel layout."""

    libraries = ""

    def check(self, config: RunConfig, world_size: int) -> None:
        """Check that the package with Muon's arithmetic is here if it is asked for; Megatron-Core does not require it."""
        if config.optimizer.name is OptimizerName.muon and not backend.is_installed("emerging_optimizers"):
            raise ModuleNotFoundError("No module named 'emerging_optimizers'", name="emerging_optimizers")

    def shards_gradients(self, config: RunConfig) -> bool:
        """Return False: the distributed optimizer spreads its state, and gradients stay whole until they are reduced."""
        return False

    def describe_adam(self, config: RunConfig, on_cuda: bool) -> str:
        """Say whose Adam it is; see :func:`rmoe_megatron.distributed.megatron_on_cpu.use_cpu`."""
        if not on_cuda:
            return "PyTorch's: others need a GPU"
        if backend.is_installed("transformer_engine"):
            return "Transformer Engine's"
        if backend.is_installed("apex", "optimizers"):
            return "Apex's"
        other = " (the apex here is PyPI's, another project)" if backend.is_installed("apex") else ""
        return f"PyTorch's: no Transformer Engine, no Apex{other}"

    def build(self, config: RunConfig, modules: nn.ModuleList, loss: DiffusionLoss) -> Engine:
        """Return a :class:`MegatronEngine`."""
        from rmoe_megatron.engine.megatron.engine import MegatronEngine

        return MegatronEngine(config, modules, loss)
