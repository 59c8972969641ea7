"""Code inside an exported folder, for users who have diffusers but not this package.

diffusers loads such a folder only if its user passes ``trust_remote_code=True``.
"""

import json
from pathlib import Path

from rmoe_megatron.hf.carried_code import PACKAGE, copy_code


def add_remote_code(folder: Path) -> None:
    """Copy the code of every class of this package that ``model_index.json`` names, and name it there by its file."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    for component, entry in index.items():
        if isinstance(entry, list) and entry[0] and entry[0].startswith(f"{PACKAGE}."):
            module = entry[0].rpartition(".")[2]
            copy_code(entry[0], folder / component)
            index[component] = [module, entry[1]]
    modules = {
        "RecurrentSD3Pipeline": "pipeline",
        "RecurrentDiTPipeline": "dit_pipeline",
        "TunedSD3Pipeline": "tuned_sd3_pipeline",
    }
    if index["_class_name"] in modules:
        module = modules[index["_class_name"]]
        copy_code(f"{PACKAGE}.hf.{module}", folder)
        index["_class_name"] = [module, index["_class_name"]]
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
