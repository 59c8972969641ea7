"""What an evaluation needs that does not come with this package: looked for before anything slow is imported.

A message holds the command that fetches it. Nothing here imports PyTorch or a model's library.
"""

import importlib.util
import re
import sys
from pathlib import Path

from rmoe_megatron.distributed import launch
from rmoe_megatron.errors import UserError

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_GITHUB = "https://raw.githubusercontent.com"
DPG_TABLE = f"{_GITHUB}/TencentQQGYLab/ELLA/main/dpg_bench/dpg_bench.csv"
GENEVAL2_PROMPTS = f"{_GITHUB}/facebookresearch/GenEval2/main/geneval2_data.jsonl"
COREBENCH = "https://github.com/KlingTeam/T2I-CoReBench"
IMAGENET_REFERENCE = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)
INCEPTION = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
# Repositories of the published scorers of preference: weights, and tokenizer with image processor.
SCORERS = {
    "pickscore": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "hpsv3": ("MizzenAI/HPSv3", "Qwen/Qwen2-VL-7B-Instruct"),
}
TIMEOUT = 10.0  # seconds that the hub may take to answer


RESULTS = "results.json"


def results_file(path: Path) -> Path:
    """Return the ``results.json`` that a path names, or the folder that it is in.

    Raises:
        UserError: there is none.
    """
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"There is no {file}; give a results.json, or the --out folder of an evaluation.")
    return file


def require_published(path: Path, option: str, url: str) -> None:
    """Check that a published file is there.

    Raises:
        UserError: it is not; the message holds the command that fetches it.
    """
    if not path.exists():
        raise UserError(f"There is no file {path} ({option}); fetch the published one with `curl -LO {url}`.")


def require_repository(folder: Path, option: str, url: str) -> None:
    """Check that a folder of a published repository is there.

    Raises:
        UserError: it is not; the message holds the command that fetches it.
    """
    if not folder.is_dir():
        raise UserError(
            f"There is no folder {folder} ({option}); fetch the published one with `git clone {url}`."
        )


def require_set(folder: Path, command: str) -> None:
    """Check that a folder of shards is there.

    Raises:
        UserError: it is not; the message holds the command that builds it.
    """
    if not folder.is_dir():
        raise UserError(f"There is no shard folder {folder}; build the set with `{command}`.")


def require_scorer(scorer: str, weights: str | None, base: str | None) -> None:
    """Check that the parts of a scorer of preference are there or can be had; None stands for the published one.

    Raises:
        UserError: there is no such scorer, or a part is not to be had.
    """
    if scorer not in SCORERS:
        raise UserError(f"--scorer {scorer} must be pickscore or hpsv3.")
    published = SCORERS[scorer]
    require_judge(weights or published[0], "--weights")
    require_judge(base or published[1], "--base")


def require_mplug() -> None:
    """Check that the library of DPG-Bench's published judge is installed.

    Raises:
        UserError: it is not.
    """
    if "modelscope" not in sys.modules and importlib.util.find_spec("modelscope") is None:
        raise UserError(
            "mPLUG needs modelscope, which is not installed; run `pip install modelscope`, or name a Qwen3-VL with --answerer, whose "
            "scores cannot be compared with published ones."
        )


def require_judge(name: str, option: str) -> None:
    """Check that a judge is a folder, lies in the hub's cache or can be had from the hub, which one rank asks.

    Raises:
        UserError: it is none of them; the message holds the command that fetches it.
    """
    if Path(name).is_dir():
        return
    if _REPOSITORY.fullmatch(name) is None:
        raise UserError(
            f"There is no folder {name} ({option}); give a local folder or a hub repository (owner/name)."
        )
    from huggingface_hub.constants import HF_HUB_CACHE

    kept = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
    if kept.is_dir() and any(kept.iterdir()):
        return
    reason = _why_not_had(name) if launch.is_main_process() else None
    if reason is not None:
        raise UserError(
            f"{name} ({option}) is not in the hub's cache here and cannot be downloaded from the hub ({reason}); run `hf download {name}` "
            "where there is a network, with the same HF_HOME."
        )


def _why_not_had(name: str) -> str | None:
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=TIMEOUT)
    except Exception as error:  # the hub raises its own, its client's and the system's errors
        return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return None
