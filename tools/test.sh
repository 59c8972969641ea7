#!/usr/bin/env bash
# Sets up the environment and runs every check: ruff, mypy, shellcheck, hadolint, pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=tools/environment.sh
source tools/environment.sh
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1

echo "== ruff"
ruff check .
ruff format --check .
echo "== mypy"
mypy
echo "== shellcheck"
shellcheck -x tools/*.sh slurm/*.sh
echo "== hadolint"
hadolint docker/Dockerfile docker/Dockerfile.cpu
echo "== pytest"
# Two processes for two cores; a file stays in one of them, and so does what its tests share.
pytest -v --numprocesses 2 --dist loadfile "$@"
