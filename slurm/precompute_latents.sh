#!/usr/bin/env bash
#SBATCH --job-name=precompute_latents
#SBATCH --nodes=1
#SBATCH --mincpus=8
#SBATCH --gpus-per-node=8
#SBATCH --array=0-7
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
# Encodes the images and texts of raw shards once; each task of each job of the array takes its part of them.
#   slurm/precompute_latents.sh [--array=0-7] [--SBATCH_OPTION=VALUE]... CONFIG SOURCE OUT [KEY=VALUE]...
# The numbers of the array may be any that lie at equal distances, like 3,5 or 0-14:2: the first task has the first part.
# OUT appears when the last shard is done. What is done is not done again when it is submitted again.
set -euo pipefail
# SLURM runs a copy of this file; then the repository is where the submission says, or where it was submitted from.
[[ ${0##*/} == slurm_script ]] || RMOE_ROOT=$(cd "$(dirname "$0")/.." && pwd)
RMOE_ROOT=${RMOE_ROOT:-$SLURM_SUBMIT_DIR}
# shellcheck source=slurm/job.sh
source "$RMOE_ROOT/slurm/job.sh"
precompute_job "$0" "$@"
