"""The same run with fewer of its blocks: blocks that are alike need alike, so that two depths say what all of them need."""

from dataclasses import dataclass, replace

from rmoe_megatron.config.run import RunConfig


@dataclass(frozen=True)
class Depths:
    """Two runs with fewer blocks.

    Attributes:
        beyond: how many times the step from the first to the second leads from the second to the whole run.
    """

    first: RunConfig
    second: RunConfig
    beyond: float

    def whole(self, first: float, second: float) -> float:
        """Return what the whole run needs of something of which the two need so much: the straight line through both."""
        return second + self.beyond * (second - first)


def two_depths(config: RunConfig) -> Depths | None:
    """Return a run with few blocks in every pipeline stage and one with a few more of them, None where that would spare nothing.

    Where blocks with modules or LoRA come at equal distances, both have some whole periods; else all of the former and few others.
    """
    model, stages = config.model, config.parallel.pipeline_model_parallel_size
    alike = not model.dual_attention_layers and config.loop is None and config.fine_tuning is None
    if not alike or config.parallel.virtual_pipeline_model_parallel_size > 1:
        return None
    has = [_is_extended(config, layer) for layer in range(model.num_layers)]
    size = model.num_layers // stages
    periods = [
        each
        for each in range(1, size + 1)
        if size % each == 0 and all(has[layer] == has[layer % each] for layer in range(len(has)))
    ]
    period = min(periods, default=len(has))
    extended = [sum(has[stage * size : (stage + 1) * size]) for stage in range(stages)]
    if 5 * period <= 2 * max(extended) + 5:
        sizes = 2 * period, 3 * period
        layers = [[layer for layer in range(each * stages) if has[layer % period]] for each in sizes]
    else:
        sizes = max(extended) + 2, max(extended) + 3
        layers = [
            [stage * each + number for stage, count in enumerate(extended) for number in range(count)]
            for each in sizes
        ]
    if sum(sizes) >= size:
        return None
    first, second = (
        _with_blocks(config, each * stages, chosen) for each, chosen in zip(sizes, layers, strict=True)
    )
    return Depths(first, second, (size - sizes[1]) / (sizes[1] - sizes[0]))


def _is_extended(config: RunConfig, layer: int) -> bool:
    return any(
        section is not None and layer in section.layers for section in (config.recurrence, config.lora)
    )


def _with_blocks(config: RunConfig, blocks: int, extended: list[int]) -> RunConfig:
    return replace(
        config,
        model=replace(config.model, num_layers=blocks),
        recurrence=config.recurrence and replace(config.recurrence, layers=extended),
        lora=config.lora and replace(config.lora, layers=extended),
    )
