#!/usr/bin/env bash
#SBATCH --job-name=convert_to_hf
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=02:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Exports a run to a diffusers folder.
#   slurm/convert_to_hf.sh [--SBATCH_OPTION=VALUE]... RUN OUT [OPTION OF rmoe convert to-hf]...
set -euo pipefail
# SLURM runs a copy of this file; then the repository is where the submission says, or where it was submitted from.
[[ ${0##*/} == slurm_script ]] || RMOE_ROOT=$(cd "$(dirname "$0")/.." && pwd)
RMOE_ROOT=${RMOE_ROOT:-$SLURM_SUBMIT_DIR}
# shellcheck source=slurm/job.sh
source "$RMOE_ROOT/slurm/job.sh"
one_task_job "$0" 0 convert to-hf "$@"
