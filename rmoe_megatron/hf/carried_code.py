"""Code that a diffusers folder carries for users without this package.

``rmoe convert to-hf --remote-code`` puts it there, ``save_pretrained`` of what was loaded from such a folder puts it
into the next one. diffusers names a class in model_index.json by the file that holds it, and copies that file and those
it imports relatively, one level deep, to a cache that it imports them from.

This file needs diffusers alone: a folder with code carries it as well.
"""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any, ClassVar

from diffusers.utils import DIFFUSERS_DYNAMIC_MODULE_NAME

PACKAGE = "rmoe_megatron"
_IMPORT = re.compile(rf"from {PACKAGE}\.(?:\w+\.)*(\w+) import")
_RELATIVE = re.compile(r"^from \.(\w+) import", re.MULTILINE)


class CarriesCode:
    """Mixin of a model or pipeline class whose code goes where its objects are saved, if it came from such a folder.

    diffusers writes the name of a component's module into model_index.json. That of a class loaded from a folder's code
    is a name in diffusers' cache, which means nothing to the next process; such a class takes the name of its file.
    """

    _carried_module: ClassVar[str | None] = None  # as it was imported; None: the class is this package's

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith(f"{DIFFUSERS_DYNAMIC_MODULE_NAME}."):
            cls._carried_module = cls.__module__
            cls.__module__ = cls.__module__.rpartition(".")[2]

    def save_config(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write the configuration, and the code beside it; ``save_pretrained`` calls this."""
        if self._carried_module is not None:
            copy_code(self._carried_module, Path(save_directory))
        super().save_config(save_directory, *args, **kwargs)  # type: ignore[misc]

    def to_json_string(self) -> str:
        """Return the configuration; that of a pipeline names a carried class with its file."""
        text: str = super().to_json_string()  # type: ignore[misc]
        if self._carried_module is None or self.config_name != "model_index.json":  # type: ignore[attr-defined]
            return text
        values = json.loads(text) | {"_class_name": [type(self).__module__, type(self).__name__]}
        return json.dumps(values, indent=2, sort_keys=True) + "\n"


def copy_code(module: str, folder: Path) -> None:
    """Copy a module and those of this package that it imports, with imports between them made relative."""
    source = _source(module)
    imported = set(re.findall(rf"from ({PACKAGE}(?:\.\w+)+) import", source))
    imported |= {f"{module.rpartition('.')[0]}.{name}" for name in _RELATIVE.findall(source)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{module.rpartition('.')[2]}.py").write_text(_IMPORT.sub(r"from .\1 import", source))
    for other in imported:
        copy_code(other, folder)


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text()
