"""Code inside an exported folder, for users who have diffusers but not this package.

diffusers loads such a folder only if its user passes ``trust_remote_code=True``. A class is named in model_index.json
by the file that holds it; diffusers copies that file and those it imports relatively, one level deep.
"""

import importlib.util
import json
import re
from pathlib import Path

PACKAGE = "rmoe_megatron"
_IMPORT = re.compile(rf"from {PACKAGE}\.(?:\w+\.)*(\w+) import")
_RELATIVE = re.compile(r"^from \.(\w+) import", re.MULTILINE)


def add_remote_code(folder: Path) -> None:
    """Copy the code of every class of this package that ``model_index.json`` names, and name it there by its file."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    for component, entry in index.items():
        if isinstance(entry, list) and entry[0] and entry[0].startswith(f"{PACKAGE}."):
            module = entry[0].rpartition(".")[2]
            _copy(entry[0], folder / component)
            index[component] = [module, entry[1]]
    modules = {"RecurrentSD3Pipeline": "pipeline", "RecurrentDiTPipeline": "dit_pipeline"}
    if index["_class_name"] in modules:
        module = modules[index["_class_name"]]
        _copy(f"{PACKAGE}.hf.{module}", folder)
        index["_class_name"] = [module, index["_class_name"]]
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _copy(module: str, folder: Path) -> None:
    """Copy a module and those of this package that it imports, with imports between them made relative."""
    source = _source(module)
    imported = set(re.findall(rf"from ({PACKAGE}(?:\.\w+)+) import", source))
    imported |= {f"{module.rpartition('.')[0]}.{name}" for name in _RELATIVE.findall(source)}
    (folder / f"{module.rpartition('.')[2]}.py").write_text(_IMPORT.sub(r"from .\1 import", source))
    for other in imported:
        _copy(other, folder)


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text()
