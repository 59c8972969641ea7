#!/usr/bin/env bash
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --mincpus=8
#SBATCH --gpus-per-node=8
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
# Trains one configuration with every line of a file of overrides, a job of an array for each line.
#   slurm/sweep.sh [--SBATCH_OPTION=VALUE]... CONFIG LINES [KEY=VALUE]...
# A line is like `optimizer.learning_rate=1e-4 recurrence.steps=3`, with quotes around a value that has blanks, as in a shell; a list
# in brackets needs none. Empty lines and what follows a # are left out. The run of line N (from 0) lies in run_dir-N; --array=0,3
# or --array=0-7%2 takes some of the lines, or so many at once. They are checked before anything is submitted.
set -euo pipefail
# SLURM runs a copy of this file; then the repository is where the submission says, or where it was submitted from.
[[ ${0##*/} == slurm_script ]] || RMOE_ROOT=$(cd "$(dirname "$0")/.." && pwd)
RMOE_ROOT=${RMOE_ROOT:-$SLURM_SUBMIT_DIR}
# shellcheck source=slurm/job.sh
source "$RMOE_ROOT/slurm/job.sh"
sweep_job "$0" "$@"
