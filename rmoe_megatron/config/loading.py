"""From a YAML file and command-line overrides to a checked, typed configuration and back."""

import difflib
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rmoe_megatron.config.model import LoopConfig, LoraConfig, RecurrenceConfig
from rmoe_megatron.config.presets import PRESETS
from rmoe_megatron.config.run import BucketsConfig, FineTuningConfig, ParallelConfig, RunConfig
from rmoe_megatron.config.yaml_text import parse_yaml
from rmoe_megatron.errors import UserError
from rmoe_megatron.files import atomic
from rmoe_megatron.files.untrusted import read_text, shown

MAX_BYTES = 1 << 20  # of a configuration
# What a run has from the one that it starts from, unless it says otherwise: what weights and pictures depend on.
BROUGHT = ("model", "recurrence", "lora", "loop", "encoders")
BROUGHT_OF_DIFFUSION = ("objective", "prediction", "shift", "shift_base_size")
OPTIONAL_SECTIONS = {
    "recurrence": RecurrenceConfig,
    "lora": LoraConfig,
    "loop": LoopConfig,
    "fine_tuning": FineTuningConfig,
    "data.buckets": BucketsConfig,
}


def load_config(path: Path, overrides: list[str]) -> RunConfig:
    """Read a YAML file, apply ``key=value`` overrides and return the typed configuration.

    Overrides use dots for nested keys and YAML for values: ``recurrence.layers=[0,2]``, ``recurrence=null``. Where ``fine_tuning.base``
    names a run, the model is that run's in all that neither the file nor an override says.

    Raises:
        UserError: the file is no YAML mapping, it has an unknown key (names the nearest valid one), a value of a wrong type, or a required
            value missing.
    """
    tree = OmegaConf.structured(RunConfig)
    values = parse_yaml(read_text(path, MAX_BYTES, follow=True), f"The configuration {path}")
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, like `seed: 0`.")
    parsed_overrides = [_parse_override(override) for override in overrides]
    sources = [(values, str(path)), *((nested, "the command line") for nested in parsed_overrides)]
    base = _base_of(sources)
    if base is not None:
        _merge(tree, _brought_by(base), f"fine_tuning.base {base}")
    _merge_preset(tree, sources)
    for nested, source in sources:
        _merge(tree, nested, source)
    try:
        missing = sorted(OmegaConf.missing_keys(tree))
        if missing and base is not None and not (base / "config.yaml").is_file():
            raise UserError(
                f"There is no run at fine_tuning.base {base} (no config.yaml); train one or import one with `rmoe convert from-hf`."
            )
        if missing:
            raise UserError(f"{path} leaves required values open: {', '.join(missing)}; add them.")
        return cast(RunConfig, OmegaConf.to_object(tree))
    except OmegaConfBaseException as error:
        name, reason = getattr(error, "full_key", None), str(error).splitlines()[0]
        raise UserError(
            f"{name or 'A value'} in {path} or its overrides cannot be resolved: {reason}."
        ) from error


def load_parallel(overrides: list[str]) -> ParallelConfig:
    """Return the parallel section that ``parallel.key=value`` settings make.

    Raises:
        UserError: a setting is unknown, of a wrong type, or of another section.
    """
    tree = OmegaConf.structured(RunConfig)
    for override in overrides:
        values = _parse_override(override)
        if set(values) != {"parallel"}:
            raise UserError(f"The setting {override!r} is not of the parallel section.")
        _merge(tree, values, "the command line")
    return cast(ParallelConfig, OmegaConf.to_object(tree.parallel))


def _parse_override(override: str) -> dict[str, Any]:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UserError(f"The override {override!r} is not of the form key=value.")
    nested = parse_yaml(value, f"The value of the override {override[:200]!r}")
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return nested


def _base_of(sources: list[tuple[dict[str, Any], str]]) -> Path | None:
    """Return the folder that the last source names as ``fine_tuning.base``."""
    sections = [values["fine_tuning"] for values, _ in sources if "fine_tuning" in values]
    if not sections or sections[-1] is None:
        return None
    named = [
        section["base"]
        for section in sections
        if isinstance(section, dict) and isinstance(section.get("base"), str)
    ]
    return Path(named[-1]) if named else None


def _brought_by(base: Path) -> dict[str, Any]:
    """Return the sections of a run's configuration that describe its model; nothing if there is no such run.

    Raises:
        UserError: the file is no configuration.
    """
    path = base / "config.yaml"
    if not path.is_file():
        return {}
    values = parse_yaml(read_text(path, MAX_BYTES, follow=True), f"The configuration {path}")
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, like `seed: 0`.")
    brought = {name: values[name] for name in BROUGHT if name in values}
    if isinstance(brought.get("model"), dict):
        brought["model"] = {key: value for key, value in brought["model"].items() if key != "preset"}
    diffusion = values.get("diffusion")
    if isinstance(diffusion, dict):
        brought["diffusion"] = {key: diffusion[key] for key in BROUGHT_OF_DIFFUSION if key in diffusion}
    return brought


def _merge_preset(tree: DictConfig, sources: list[tuple[dict[str, Any], str]]) -> None:
    """Fill the model section from the preset that the last source names."""
    models = [
        (values["model"], source) for values, source in sources if isinstance(values.get("model"), dict)
    ]
    named = [(model["preset"], source) for model, source in models if model.get("preset") is not None]
    if not named:
        return
    name, source = named[-1]
    if not isinstance(name, str) or name not in PRESETS:
        nearest = difflib.get_close_matches(str(name), PRESETS, n=1, cutoff=0.4)
        suggestion = f"did you mean {nearest[0]}?" if nearest else f"presets are {', '.join(PRESETS)}."
        raise UserError(f"Unknown model.preset {name!r} in {source}; {suggestion}")
    _merge(tree, {"model": PRESETS[name]}, f"the preset {name}")


def to_yaml(config: RunConfig) -> str:
    """Return the resolved configuration as YAML that :func:`load_config` reads back to the same values."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration; the file appears whole or not at all."""
    atomic.write(path, to_yaml(config))


def _merge(tree: DictConfig, values: dict[str, Any], source: str, prefix: str = "") -> None:
    """Merge ``values`` into ``tree`` key by key, so that every complaint can name its key."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        if not isinstance(key, str) or (key not in list(tree) and not _is_free(tree)):
            raise UserError(f"Unknown key {path} in {source}{_nearest(str(key), path, prefix, tree)}?")
        node = tree._get_node(key) if key in list(tree) else None
        if isinstance(value, dict) and path in OPTIONAL_SECTIONS:
            if tree[key] is None:
                tree[key] = OmegaConf.structured(OPTIONAL_SECTIONS[path])
            _merge(tree[key], value, source, f"{path}.")
        elif isinstance(value, dict) and isinstance(node, DictConfig) and not node._is_none():
            _merge(node, value, source, f"{path}.")
        else:
            _refuse_interpolation(path, value)
            try:
                OmegaConf.update(tree, key, value)
            except (OmegaConfBaseException, ValueError, TypeError, OverflowError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"{path} in {source} cannot be {shown(value)}: {reason}.") from error


def _refuse_interpolation(path: str, value: Any) -> None:
    """A configuration says what it means: OmegaConf would read other values, and even the environment, into it."""
    if isinstance(value, str) and "${" in value:
        raise UserError(
            f"{path} cannot be {shown(value)}: values with ${{...}} are not resolved; write them out."
        )
    for entry in value if isinstance(value, list) else value.values() if isinstance(value, dict) else ():
        _refuse_interpolation(path, entry)


def _is_free(node: DictConfig) -> bool:
    """A mapping without a schema, such as the arguments of wandb.init."""
    return OmegaConf.get_type(node) is dict


def _nearest(key: str, path: str, prefix: str, tree: DictConfig) -> str:
    """Suggest the nearest valid key of this section, else the same key of another one."""
    here = difflib.get_close_matches(key, [str(name) for name in tree], n=1)
    if here:
        return f"; did you mean {prefix}{here[0]}"
    everywhere = _all_keys(OmegaConf.structured(RunConfig)) + [
        f"{section}.{name}"
        for section, schema in OPTIONAL_SECTIONS.items()
        for name in OmegaConf.structured(schema)
    ]
    by_leaf = [full for full in everywhere if full.rsplit(".", 1)[-1] == key]
    nearest = by_leaf or difflib.get_close_matches(path, everywhere, n=1, cutoff=0.4)
    if not nearest:
        return f"; valid here are {', '.join(str(name) for name in tree)}. Is it one of them"
    return f"; did you mean {nearest[0]}"


def _all_keys(node: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for name in node:
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none() and not _is_free(child):
            keys += _all_keys(child, f"{prefix}{name!s}.")
        else:
            keys.append(f"{prefix}{name!s}")
    return keys
