# Sourced by the scripts in this folder: makes the virtual environment and activates it.
# RMOE_VENV names another place than .venv. A second call finds the stamp of pyproject.toml and does nothing.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${RMOE_VENV:-$root/.venv}
stamp=$venv/pyproject.sha256

if ! sha256sum --check --status "$stamp" 2>/dev/null; then
    python=$(command -v python3.11 || command -v python3)
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
        echo "error: Python 3.11 is needed; $python is $("$python" --version)." >&2
        exit 2
    }
    echo "Setting up $venv"
    "$python" -m venv "$venv"
    # torch first: a later, unpinned request could replace a CPU build by gigabytes of CUDA libraries.
    "$venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
    "$venv/bin/pip" install --quiet --disable-pip-version-check --editable "${root}[dev]"
    sha256sum "$root/pyproject.toml" > "$stamp"
fi
# shellcheck source=/dev/null
source "$venv/bin/activate"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
