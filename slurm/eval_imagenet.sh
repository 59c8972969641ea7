#!/usr/bin/env bash
#SBATCH --job-name=eval_imagenet
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=12:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Scores an exported model on ImageNet at 256 pixels.
#   slurm/eval_imagenet.sh [--SBATCH_OPTION=VALUE]... MODEL [OPTION OF rmoe eval imagenet]...
set -euo pipefail
# SLURM runs a copy of this file; then the repository is where the submission says, or where it was submitted from.
[[ ${0##*/} == slurm_script ]] || RMOE_ROOT=$(cd "$(dirname "$0")/.." && pwd)
RMOE_ROOT=${RMOE_ROOT:-$SLURM_SUBMIT_DIR}
# shellcheck source=slurm/job.sh
source "$RMOE_ROOT/slurm/job.sh"
one_task_job "$0" 1 eval imagenet "$@"
