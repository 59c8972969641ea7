"""DeepSpeed's engine before it is built."""

from torch import nn

from rmoe_megatron.config.run import RunConfig
from rmoe_megatron.diffusion.loss import DiffusionLoss
from rmoe_megatron.engine.deepspeed.library import check_deepspeed
from rmoe_megatron.engine.kind import EngineKind
from rmoe_megatron.engine.protocol import Engine


class DeepSpeedKind(EngineKind):
    """Shards over data-parallel ranks with ZeRO."""

    libraries = " and DeepSpeed"

    def check(self, config: RunConfig, world_size: int) -> None:
        """Check that DeepSpeed is here and takes its options."""
        check_deepspeed(config, world_size)

    def shards_gradients(self, config: RunConfig) -> bool:
        """Whether ZeRO's stage is one that shards gradients."""
        return config.deepspeed.zero_stage > 1

    def describe_adam(self, config: RunConfig, on_cuda: bool) -> str:
        """Say that it is PyTorch's, and where it is."""
        where = " on the host" if config.deepspeed.offload_optimizer else ""
        return f"PyTorch's{where} on the flat shards of DeepSpeed's ZeRO {config.deepspeed.zero_stage}"

    def build(self, config: RunConfig, modules: nn.ModuleList, loss: DiffusionLoss) -> Engine:
        """Return a :class:`DeepSpeedEngine`."""
        from rmoe_megatron.engine.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(config, modules, loss)
