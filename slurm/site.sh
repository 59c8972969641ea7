# shellcheck shell=bash
# The settings of your cluster. Edit this file, and no other in this folder. It is read twice: on the login node at submission
# and in every job. Each setting can also be given in the environment of the submission, which takes precedence.

# --- what is asked of SLURM ------------------------------------------------------------------------------------------------
: "${SITE_ACCOUNT=}"          # --account; empty: your default
: "${SITE_PARTITION=}"        # --partition; empty: the cluster's default
: "${SITE_QOS=}"              # --qos; empty: the default
: "${SITE_CONSTRAINT=}"       # --constraint: features of nodes, for instance h100
: "${SITE_RESERVATION=}"      # --reservation
: "${SITE_EXCLUDE=}"          # --exclude: nodes that are known to be bad
: "${SITE_GPUS_PER_NODE=8}"   # GPUs of a node; a training job has one task for each. 0: no GPU, SITE_TASKS_PER_NODE tasks
: "${SITE_GPU_TYPE=}"         # --gpus-per-node=TYPE:N where nodes have several types
: "${SITE_GPU_MODEL=}"        # a100, h100, h200, b200 or mi300x: the check counts memory against it; empty: it does not
: "${SITE_TASKS_PER_NODE=$((SITE_GPUS_PER_NODE > 0 ? SITE_GPUS_PER_NODE : 1))}"
: "${SITE_CPUS_PER_TASK=}"    # --cpus-per-task; empty: 1. Data loading takes data.num_workers of them
: "${SITE_MEMORY_PER_NODE=}"  # --mem; empty: the cluster's default. 0 is all of a node
: "${SITE_SBATCH_OPTIONS=}"   # anything else, for instance "--switches=1 --comment='two words'"

# --- where things lie (on a file system that all nodes see) ----------------------------------------------------------------
: "${SITE_LOGS=$PWD/logs}"    # what jobs print: NAME-JOB.log; and configurations as they were at submission
: "${SITE_RUN_ROOT=}"         # runs go to SITE_RUN_ROOT/NAME_OF_CONFIG; empty: where the configuration's run_dir says
: "${HF_HOME=$HOME/.cache/huggingface}"             # frozen encoders, fetched before: hf download OWNER/NAME
: "${TORCHINDUCTOR_CACHE_DIR=/tmp/$(id -un)/inductor}" # local to a node: thousands of small files
: "${TRITON_CACHE_DIR=/tmp/$(id -un)/triton}"
export HF_HOME TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false # compute nodes download nothing

# --- software: a virtual environment or modules, or a container ------------------------------------------------------------
: "${SITE_MODULES=}"           # what `module load` takes, for instance "cuda/13.0 apptainer"; empty: no modules
: "${SITE_CONTAINER_RUNTIME=}" # pyxis (srun --container-image), enroot (without pyxis) or apptainer; empty: no container
: "${SITE_CONTAINER_IMAGE=}"   # pyxis: REGISTRY#IMAGE or a .sqsh file; enroot: a .sqsh file or a container's name; apptainer: a .sif file
: "${SITE_CONTAINER_MOUNTS=$PWD,$HF_HOME}" # folders of data, runs and caches, as they are called outside, or OUTSIDE:INSIDE
: "${SITE_CONTAINER_OPTIONS=}" # anything else: of srun with pyxis, of enroot start, of apptainer exec
: "${SITE_VENV=$RMOE_ROOT/.venv}"          # without a container, and for the check on a login node that has none

activate_environment() { # makes `rmoe` callable; without a container in jobs too. Conda and the like go here
    if [[ -f $SITE_VENV/bin/activate ]]; then
        # shellcheck source=/dev/null
        source "$SITE_VENV/bin/activate"
    fi
}

# --- network ---------------------------------------------------------------------------------------------------------------
# NCCL finds InfiniBand by itself; name the interfaces where it takes a wrong one.
: "${SITE_NETWORK_INTERFACE=}" # of NCCL's and gloo's sockets, for instance ib0 or bond0
: "${SITE_IB_DEVICES=}"        # of NCCL's InfiniBand or RoCE, for instance mlx5_0,mlx5_1 or mlx5
[[ -z $SITE_NETWORK_INTERFACE ]] || export NCCL_SOCKET_IFNAME=$SITE_NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$SITE_NETWORK_INTERFACE
[[ -z $SITE_IB_DEVICES ]] || export NCCL_IB_HCA=$SITE_IB_DEVICES
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

# --- check of the nodes before a training begins ---------------------------------------------------------------------------
: "${SITE_PREFLIGHT=0}"        # 1: check GPUs, driver, bandwidth, disk, clock and file system of all nodes; a bad node is named, and
                               # SLURM starts the job again without it. It takes about a minute
: "${SITE_MIN_BANDWIDTH=0}"    # GB/s of an all-reduce between nodes, as nccl-tests count it (bus bandwidth); 0: only said
: "${SITE_MIN_FREE_DISK=10}"   # GB that must be free where runs lie and in a node's folder for temporary files
: "${SITE_MAX_CLOCK_SKEW=5}"   # seconds that a node's clock may differ from the others'
