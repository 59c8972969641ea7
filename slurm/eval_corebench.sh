#!/usr/bin/env bash
#SBATCH --job-name=eval_corebench
#SBATCH --nodes=1
#SBATCH --mincpus=8
#SBATCH --gpus-per-node=8
#SBATCH --time=12:00:00
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Scores an exported model on T2I-CoReBench.
# All ranks share the work; what is done is not done again when it is submitted again.
#   slurm/eval_corebench.sh [--SBATCH_OPTION=VALUE]... MODEL [OPTION OF rmoe eval corebench]...
set -euo pipefail
# SLURM runs a copy of this file; then the repository is where the submission says, or where it was submitted from.
[[ ${0##*/} == slurm_script ]] || RMOE_ROOT=$(cd "$(dirname "$0")/.." && pwd)
RMOE_ROOT=${RMOE_ROOT:-$SLURM_SUBMIT_DIR}
# shellcheck source=slurm/job.sh
source "$RMOE_ROOT/slurm/job.sh"
all_tasks_job "$0" eval corebench "$@"
