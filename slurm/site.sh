# shellcheck shell=bash
# The settings of your cluster. Edit this file, and no other in this folder. It is read twice: on the login node at submission
# and in every job. Each setting can also be given in the environment of the submission, which takes precedence.

# --- what is asked of SLURM ------------------------------------------------------------------------------------------------
: "${SITE_ACCOUNT=}"          # --account; empty: your default
: "${SITE_PARTITION=}"        # --partition; empty: the cluster's default
: "${SITE_QOS=}"              # --qos; empty: the default
: "${SITE_GPUS_PER_NODE=8}"   # GPUs of a node; a training job has one task for each. 0: no GPU, SITE_TASKS_PER_NODE tasks
: "${SITE_TASKS_PER_NODE=$((SITE_GPUS_PER_NODE > 0 ? SITE_GPUS_PER_NODE : 1))}"
: "${SITE_CPUS_PER_TASK=}"    # --cpus-per-task; empty: 1. Data loading takes data.num_workers of them
: "${SITE_MEMORY_PER_NODE=}"  # --mem; empty: the cluster's default. 0 is all of a node
: "${SITE_SBATCH_OPTIONS=}"   # anything else, for instance "--constraint=h100 --reservation=team"

# --- where things lie (on a file system that all nodes see) ----------------------------------------------------------------
: "${SITE_LOGS=$PWD/logs}"    # what jobs print: NAME-JOB.log
: "${SITE_RUN_ROOT=}"         # runs go to SITE_RUN_ROOT/NAME_OF_CONFIG; empty: where the configuration's run_dir says
: "${HF_HOME=$HOME/.cache/huggingface}"             # frozen encoders, fetched before: hf download OWNER/NAME
: "${TORCHINDUCTOR_CACHE_DIR=/tmp/$(id -un)/inductor}" # local to a node: thousands of small files
: "${TRITON_CACHE_DIR=/tmp/$(id -un)/triton}"
export HF_HOME TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false # compute nodes download nothing

# --- software: a virtual environment or modules, or a container ------------------------------------------------------------
: "${SITE_CONTAINER_RUNTIME=}" # pyxis (srun --container-image, with enroot) or apptainer; empty: no container
: "${SITE_CONTAINER_IMAGE=}"   # pyxis: REGISTRY#IMAGE or a .sqsh file; apptainer: a .sif file (docker/README.md makes both)
: "${SITE_CONTAINER_MOUNTS=$PWD,$HF_HOME}" # folders of data, runs and caches, as they are called outside
: "${SITE_VENV=$RMOE_ROOT/.venv}"          # without a container, and for the check on a login node that has none

activate_environment() { # makes `rmoe` callable; without a container in jobs too. Modules, conda and so on go here
    if [[ -f $SITE_VENV/bin/activate ]]; then
        # shellcheck source=/dev/null
        source "$SITE_VENV/bin/activate"
    fi
}

# --- network ---------------------------------------------------------------------------------------------------------------
# NCCL finds InfiniBand by itself; name the interfaces where it takes a wrong one.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
: "${NCCL_DEBUG=WARN}"
: "${TORCH_NCCL_ASYNC_ERROR_HANDLING=1}" # a hung collective ends its rank, and that the job
: "${OMP_NUM_THREADS=1}"                 # tasks share a node's cores; data loading has processes of its own
export NCCL_DEBUG TORCH_NCCL_ASYNC_ERROR_HANDLING OMP_NUM_THREADS
# Rank 0 is the first node of the job and the port follows from the job's number; set these to have it otherwise.
# export MASTER_ADDR= MASTER_PORT=

# --- time and restarts -----------------------------------------------------------------------------------------------------
: "${SITE_SIGNAL_SECONDS=600}" # before its time is up a job is told to save and start anew; at least two saves and a step
: "${SITE_MAX_RESTARTS=5}"     # in a row without a new checkpoint; then a job ends for good
: "${SITE_COMMENT_SECONDS=60}" # how often squeue's %k (comment) shows step, loss and remaining time; 0: never
