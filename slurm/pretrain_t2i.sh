#!/usr/bin/env bash
#SBATCH --job-name=pretrain_t2i
#SBATCH --nodes=4
#SBATCH --mincpus=8
#SBATCH --gpus-per-node=8
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Pretrains a text-to-image model.
#   slurm/pretrain_t2i.sh [--SBATCH_OPTION=VALUE]... [CONFIG] [KEY=VALUE]...     default: configs/t2i_2b.yaml
#   slurm/pretrain_t2i.sh [--SBATCH_OPTION=VALUE]... --resume RUN [KEY=VALUE]...
# It is checked here, submitted with what site.sh says, and starts itself anew when it is preempted or its time is up.
set -euo pipefail
# SLURM runs a copy of this file; then the repository is where the submission says, or where it was submitted from.
[[ ${0##*/} == slurm_script ]] || RMOE_ROOT=$(cd "$(dirname "$0")/.." && pwd)
RMOE_ROOT=${RMOE_ROOT:-$SLURM_SUBMIT_DIR}
# shellcheck source=slurm/job.sh
source "$RMOE_ROOT/slurm/job.sh"
train_job "$0" configs/t2i_2b.yaml "$@"
