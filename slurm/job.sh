# shellcheck shell=bash
# What the scripts of this folder share: submission with a check before it, and the job with its restarts. Sourced by them.
#
# The same script runs twice. On the login node (bash slurm/pretrain_t2i.sh ...) it checks what it is given and submits
# itself; as a job it trains. `sbatch slurm/pretrain_t2i.sh ...` submits it without the check, which the job then does first.
#
# RMOE_ROOT is the repository. Exit codes of a job: 0 done, 2 a mistake of the user's, else a failure.

# shellcheck source=slurm/site.sh
source "$RMOE_ROOT/slurm/site.sh"

is_job() { # SLURM runs a copy of the script, of this name
    [[ ${0##*/} == slurm_script ]]
}

fail() { # fail MESSAGE...: a mistake of the user's
    echo "error: $*" >&2
    exit 2
}

# ---------------------------------------------------------------------------------------------------------------- login node

sbatch_options=() nodes='' tasks_per_node=${RMOE_TASKS_PER_NODE:-$SITE_TASKS_PER_NODE}

split_arguments() { # split_arguments "$@": --OPTION=VALUE up to the first other word are sbatch's; the rest is in words
    words=()
    while [[ ${1:-} == --*=* || ${1:-} == --exclusive ]]; do
        case $1 in
            --nodes=*) nodes=${1#*=} ;;
            --ntasks-per-node=*) tasks_per_node=${1#*=} ;;
            *) sbatch_options+=("$1") ;;
        esac
        shift
    done
    [[ ${1:-} != -* || ${1:-} == --resume ]] ||
        fail "'$1' is not understood; give options of sbatch as --option=value, before everything else."
    words=("$@")
}

site_options() { # options: what site.sh asks of SLURM, then what the command line asks
    options=(--output="$SITE_LOGS/%x-%j.log" --open-mode=append)
    [[ -z $SITE_ACCOUNT ]] || options+=(--account="$SITE_ACCOUNT")
    [[ -z $SITE_PARTITION ]] || options+=(--partition="$SITE_PARTITION")
    [[ -z $SITE_QOS ]] || options+=(--qos="$SITE_QOS")
    [[ -z $SITE_MEMORY_PER_NODE ]] || options+=(--mem="$SITE_MEMORY_PER_NODE")
    local more
    read -ra more <<< "$SITE_SBATCH_OPTIONS"
    options+=("${more[@]}")
}

task_options() { # options: of a job with a task for every GPU. SLURM is not told of tasks: it would insist on their number when it
    # starts a job again with fewer nodes.
    options+=(--mincpus="$((tasks_per_node * ${SITE_CPUS_PER_TASK:-1}))" --gpus-per-node="$SITE_GPUS_PER_NODE")
    export RMOE_TASKS_PER_NODE=$tasks_per_node
}

submit() { # submit SCRIPT ARGUMENTS...: with options and sbatch_options; prints sbatch's answer, sets submitted
    local answer
    mkdir -p "$SITE_LOGS"
    export RMOE_ROOT
    answer=$(sbatch "${options[@]}" "${sbatch_options[@]}" "$@")
    # shellcheck disable=SC2034 # pipeline.sh reads it
    submitted=${answer##* }
    echo "$answer"
    echo "$(basename "$1" .sh) prints to $SITE_LOGS" >&2
}

rmoe_on_login_node() { # rmoe_on_login_node ARGUMENTS...; 127 if there is no rmoe here
    if [[ $SITE_CONTAINER_RUNTIME == apptainer ]]; then
        apptainer exec --bind "$SITE_CONTAINER_MOUNTS" "$SITE_CONTAINER_IMAGE" rmoe "$@"
        return
    fi
    (activate_environment && command -v rmoe > /dev/null || exit 127; CUDA_VISIBLE_DEVICES='' rmoe "$@")
}

require_command() { # require_command COMMAND...: rmoe has it, or nothing is submitted
    local code=0
    rmoe_on_login_node "$@" --help > /dev/null 2>&1 || code=$?
    [[ $code == 0 || $code == 127 ]] || fail "\`rmoe $*\` is not part of this version; nothing is submitted."
}

check_training() { # check_training ARGUMENTS...: of rmoe train; sets run_dir
    local most_nodes=${nodes##*-} code=0 report
    [[ $most_nodes =~ ^[1-9][0-9]*$ && $tasks_per_node =~ ^[1-9][0-9]*$ ]] ||
        fail "--nodes=$nodes --ntasks-per-node=$tasks_per_node are no numbers; nothing is submitted."
    run_dir=''
    report=$(rmoe_on_login_node train "$@" --check --ranks $((most_nodes * tasks_per_node))) || code=$?
    if [[ $code == 127 ]]; then
        echo "not checked: there is no rmoe on this node (SITE_VENV, SITE_CONTAINER_RUNTIME); the job checks first." >&2
    elif [[ $code != 0 ]]; then
        echo "nothing is submitted." >&2
        exit "$code"
    else
        run_dir=$(sed -n 's/^# run folder: //p' <<< "$report")
    fi
}

training_arguments() { # training_arguments DEFAULT_CONFIG WORDS...: arguments of rmoe train are in arguments
    local config=$1
    shift
    if [[ ${1:-} == --resume ]]; then
        arguments=("$@")
        return
    fi
    if [[ $# -gt 0 && $1 != *=* ]]; then
        config=$1
        shift
    elif [[ ! -f $config ]]; then
        config=$RMOE_ROOT/$config
    fi
    arguments=("$config" "$@")
    if [[ -n $SITE_RUN_ROOT && " $*" != *" run_dir="* ]]; then
        arguments+=("run_dir=$SITE_RUN_ROOT/$(basename "$config" .yaml)")
    fi
}

train_job() { # train_job SCRIPT DEFAULT_CONFIG ARGUMENTS...: check and submit, or train
    local script=$1 config=$2
    shift 2
    if is_job; then
        training_arguments "$config" "$@"
        train_in_job "${arguments[@]}"
    else
        submit_training "$script" "$config" "$@"
    fi
}

submit_training() { # submit_training SCRIPT DEFAULT_CONFIG ARGUMENTS...: sets run_dir, prints sbatch's answer
    local script=$1 config=$2
    shift 2
    nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$script")
    split_arguments "$@"
    training_arguments "$config" "${words[@]}"
    check_training "${arguments[@]}"
    site_options
    task_options
    options+=(--nodes="$nodes" --signal="B:USR1@$SITE_SIGNAL_SECONDS" --requeue)
    RMOE_RUN_DIR=$run_dir submit "$script" "${arguments[@]}"
}

check_precompute() { # check_precompute CONFIG SOURCE OUT [KEY=VALUE]...
    local code=0
    rmoe_on_login_node data precompute "$@" --check || code=$?
    if [[ $code != 0 && $code != 127 ]]; then
        echo "nothing is submitted." >&2
        exit "$code"
    fi
}

read_sweep() { # read_sweep FILE: its lines that are overrides are in lines
    mapfile -t lines < <(sed 's/#.*//' "$1" | grep -v '^[[:space:]]*$')
}

submit_sweep() { # submit_sweep SCRIPT ARGUMENTS...: check every line, submit an array
    local script=$1 number line copy sweep_dir
    shift
    nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$script")
    split_arguments "$@"
    [[ ${#words[@]} -ge 2 && -f ${words[1]} ]] || fail "a configuration and a file of overrides are needed; nothing is submitted."
    read_sweep "${words[1]}"
    [[ ${#lines[@]} -gt 0 ]] || fail "${words[1]} has no line of overrides; nothing is submitted."
    training_arguments "${words[0]}" "${words[0]}" "${words[@]:2}"
    check_training "${arguments[@]}"
    sweep_dir=$run_dir
    [[ -n $sweep_dir ]] || fail "where the runs will lie is not known on this node (see above); nothing is submitted."
    for number in "${!lines[@]}"; do
        read -ra line <<< "${lines[number]}"
        check_training "${arguments[@]}" "${line[@]}" "run_dir=$sweep_dir-$number"
        echo "line $number is fine: ${lines[number]}" >&2
    done
    # As they are now: the file may change while jobs wait.
    mkdir -p "$SITE_LOGS"
    copy=$(mktemp "$SITE_LOGS/sweep-XXXXXX")
    printf '%s\n' "${lines[@]}" > "$copy"
    site_options
    task_options
    options+=(--output="$SITE_LOGS/%x-%A_%a.log" --array="0-$((${#lines[@]} - 1))" --nodes="$nodes")
    options+=(--signal="B:USR1@$SITE_SIGNAL_SECONDS" --requeue)
    RMOE_RUN_DIR=$sweep_dir submit "$script" "${words[0]}" "$copy" "${words[@]:2}"
}

# ----------------------------------------------------------------------------------------------------------------------- job

in_tasks() { # in_tasks SRUN_OPTIONS... -- COMMAND...: run a command in tasks, in the site's container or environment
    local options=()
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    case $SITE_CONTAINER_RUNTIME in
        pyxis)
            local mounts
            mounts=$(tr ',' '\n' <<< "$SITE_CONTAINER_MOUNTS" | sed 's/.*/&:&/' | paste --serial --delimiters=,)
            exec srun "${options[@]}" --container-image="$SITE_CONTAINER_IMAGE" --container-mounts="$mounts" \
                --no-container-mount-home --container-workdir="$PWD" "$@"
            ;;
        apptainer)
            exec srun "${options[@]}" apptainer exec --nv --bind "$SITE_CONTAINER_MOUNTS" --pwd "$PWD" \
                "$SITE_CONTAINER_IMAGE" "$@"
            ;;
        '')
            activate_environment
            command -v "$1" > /dev/null || fail "there is no $1 in this job; see SITE_VENV and activate_environment in site.sh."
            exec srun "${options[@]}" "$@"
            ;;
        *) fail "SITE_CONTAINER_RUNTIME=$SITE_CONTAINER_RUNTIME is neither pyxis nor apptainer nor empty." ;;
    esac
}

in_all_tasks() { # in_all_tasks SRUN_OPTIONS... -- COMMAND...: as in_tasks, with a task for every GPU of the job
    in_tasks --ntasks-per-node="$tasks_per_node" --cpus-per-task="${SITE_CPUS_PER_TASK:-1}" "$@"
}

run_one_task() { # run_one_task ARGUMENTS...: rmoe once, on one node of the job
    (in_tasks --nodes=1 --ntasks=1 -- rmoe "$@")
}

set_end_time() { # newer SLURM says when a job's time is up, older ones are asked
    local end
    if [[ -z ${SLURM_JOB_END_TIME:-} ]] && end=$(date -d "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format=%e)" +%s 2> /dev/null)
    then
        export SLURM_JOB_END_TIME=$end
    fi
}

find_run_dir() { # find_run_dir ARGUMENTS...: run_dir as the submission found it, or by the check that it could not do
    local report
    run_dir=${RMOE_RUN_DIR:-}
    if [[ -z $run_dir ]]; then
        report=$(run_one_task train "$@" --check --ranks "$((SLURM_JOB_NUM_NODES * tasks_per_node))") || exit
        run_dir=$(sed -n 's/^# run folder: //p' <<< "$report")
    fi
}

one_task_job() { # one_task_job SCRIPT GPUS COMMAND SUBCOMMAND ARGUMENTS...: submit rmoe COMMAND SUBCOMMAND, or run it
    local script=$1 gpus=$2 command=("$3" "$4")
    shift 4
    if is_job; then
        run_one_task "${command[@]}" "$@"
        return
    fi
    require_command "${command[@]}"
    split_arguments "$@"
    site_options
    options+=(--gpus-per-node="$((SITE_GPUS_PER_NODE > 0 ? gpus : 0))")
    submit "$script" "${words[@]}"
}

all_tasks_job() { # all_tasks_job SCRIPT COMMAND SUBCOMMAND ARGUMENTS...: as one_task_job, with a task for every GPU
    local script=$1 command=("$2" "$3")
    shift 3
    if is_job; then
        (in_all_tasks --kill-on-bad-exit=1 -- rmoe "${command[@]}" "$@")
        return
    fi
    require_command "${command[@]}"
    split_arguments "$@"
    site_options
    task_options
    [[ -z $nodes ]] || options+=(--nodes="$nodes")
    submit "$script" "${words[@]}"
}

precompute_job() { # precompute_job SCRIPT ARGUMENTS...: check and submit rmoe data precompute, or run a part of it
    local script=$1
    shift
    if is_job; then
        (in_all_tasks --kill-on-bad-exit=1 -- rmoe data precompute "$@" \
            --part "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))/$SLURM_ARRAY_TASK_COUNT")
        return
    fi
    split_arguments "$@"
    [[ ${#words[@]} -ge 3 ]] || fail "a configuration, SOURCE and OUT are needed; nothing is submitted."
    check_precompute "${words[@]}"
    site_options
    task_options
    options+=(--output="$SITE_LOGS/%x-%A_%a.log")
    [[ -z $nodes ]] || options+=(--nodes="$nodes")
    submit "$script" "${words[@]}"
}

sweep_job() { # sweep_job SCRIPT CONFIG LINES ARGUMENTS...: check and submit, or train one line
    local script=$1 line number=${SLURM_ARRAY_TASK_ID:-}
    shift
    if ! is_job; then
        submit_sweep "$script" "$@"
        return
    fi
    read_sweep "$2"
    read -ra line <<< "${lines[number]}"
    RMOE_RUN_DIR=$RMOE_RUN_DIR-$number
    train_in_job "$1" "${@:3}" "${line[@]}" "run_dir=$RMOE_RUN_DIR"
}

train_in_job() { # train_in_job ARGUMENTS...: of rmoe train; ends the job
    local code=0 signalled=false is_cancelled=false process reporter=''
    set_end_time
    find_run_dir "$@"
    if ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ -f $run_dir/config.yaml && $1 != --resume ]]; then
        set -- --resume "$run_dir" "${@:2}"
    fi
    # Ranks that fail end each other and say why; SLURM waits a minute for that before it ends them.
    (in_all_tasks --kill-on-bad-exit=0 --wait=60 -- rmoe train "$@") &
    process=$!
    # The time is nearly up: srun hands the signal on to all ranks, which save and exit with 75.
    trap 'signalled=true; kill -USR1 "$process"' USR1
    # The job is cancelled or preempted: SLURM tells the ranks itself, and decides itself whether to start it again.
    trap 'signalled=true; is_cancelled=true' TERM
    if ((SITE_COMMENT_SECONDS > 0)); then
        comment_on_job "$run_dir" &
        reporter=$!
    fi
    wait "$process" || code=$?
    while $signalled; do # a signal ends the waiting, not what is waited for
        signalled=false code=0
        wait "$process" || code=$?
    done
    [[ -z $reporter ]] || kill "$reporter" 2> /dev/null || true
    end_or_start_anew "$code" "$is_cancelled"
}

comment_on_job() { # comment_on_job RUN: keep squeue's comment at what the run says of itself
    while sleep "$SITE_COMMENT_SECONDS"; do
        if [[ -f $1/status ]]; then
            scontrol update JobId="$SLURM_JOB_ID" Comment="$(head -c 200 "$1/status")" > /dev/null 2>&1 || true
        fi
    done
}

end_or_start_anew() { # end_or_start_anew CODE IS_CANCELLED: of the run in run_dir
    local code=$1 is_cancelled=$2 newest=none folder same job
    if [[ $code == 0 || $code == 2 ]]; then
        exit "$code"
    fi
    if $is_cancelled; then
        echo "job $SLURM_JOB_ID was ended by SLURM (exit code $code); the run in $run_dir can be resumed." >&2
        exit "$code"
    fi
    mkdir -p "$run_dir"
    for folder in "$run_dir"/checkpoints/step-????????; do
        [[ ! -d $folder ]] || newest=${folder##*/}
    done
    echo "$SLURM_JOB_ID $newest $code" >> "$run_dir/restarts"
    # How many lines of this job with the same newest checkpoint are the last.
    same=$(awk -v line="$SLURM_JOB_ID $newest" '{ n = $1 " " $2 == line ? n + 1 : 0 } END { print n }' "$run_dir/restarts")
    if ((same > SITE_MAX_RESTARTS)); then
        echo "error: job $SLURM_JOB_ID was started again $SITE_MAX_RESTARTS times without a new checkpoint (the newest is" \
            "$newest, the last exit code $code); it ends, see above why." >&2
        exit "$code"
    fi
    # On a lost node this script may outlive the loss, after which SLURM has started the job again itself.
    job=$(scontrol --oneliner show job "$SLURM_JOB_ID")
    if [[ $job == *" JobState=RUNNING "* && $job == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]; then
        echo "job $SLURM_JOB_ID starts anew after exit code $code, restart $same of $SITE_MAX_RESTARTS without a new checkpoint." >&2
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}
