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

sbatch_options=() nodes='' array='' is_dry_run=false tasks_per_node=${RMOE_TASKS_PER_NODE:-$SITE_TASKS_PER_NODE}

split_arguments() { # split_arguments "$@": --OPTION=VALUE up to the first other word are sbatch's; the rest is in words
    words=()
    while [[ ${1:-} == --*=* || ${1:-} == --exclusive || ${1:-} == --dry-run ]]; do
        case $1 in
            --dry-run) is_dry_run=true ;;
            --nodes=*) nodes=${1#*=} ;;
            --ntasks-per-node=*) tasks_per_node=${1#*=} ;;
            --array=*) array=${1#*=} ;;
            *) sbatch_options+=("$1") ;;
        esac
        shift
    done
    [[ ${1:-} != -* || ${1:-} == --resume ]] ||
        fail "'$1' is not understood; give options of sbatch as --option=value, before everything else."
    words=("$@")
}

split_line() { # split_line TEXT: its words, as a shell takes them, are in words_of_line; a [list, of "several words"] is one, with its quotes
    local text=${1%$'\r'} word='' quote='' character is_word=false depth=0
    words_of_line=()
    while [[ -n $text ]]; do
        character=${text:0:1} text=${text:1}
        if [[ -n $quote ]]; then
            if [[ $character == "$quote" ]]; then
                quote=''
                ((depth == 0)) || word+=$character
            elif [[ $quote == '"' && $character == \\ && $text == [\"\\]* ]]; then
                ((depth == 0)) || word+=$character
                word+=${text:0:1} text=${text:1}
            else
                word+=$character
            fi
        elif [[ $character == [\'\"] ]]; then
            quote=$character is_word=true
            ((depth == 0)) || word+=$character
        elif ((depth == 0)) && [[ $character == \\ ]]; then
            word+=${text:0:1} text=${text:1} is_word=true
        elif ((depth == 0)) && [[ $character == [[:space:]] ]]; then
            if $is_word; then words_of_line+=("$word"); fi
            word='' is_word=false
        elif [[ $character == '#' ]] && ! $is_word; then
            break
        else
            case $character in
                [\[\{]) ((depth += 1)) ;;
                [\]\}]) ((depth -= depth > 0)) || true ;;
            esac
            word+=$character is_word=true
        fi
    done
    [[ -z $quote ]] || fail "a quote $quote is not closed in: $1"
    if $is_word; then words_of_line+=("$word"); fi
}

refuse_array() { # refuse_array SCRIPT: its job is one
    local given=${array:-${SBATCH_ARRAY_INX:-}}
    [[ -z $given ]] || fail "${1##*/} is one job, not an array (--array=$given); sweep.sh and precompute_latents.sh submit arrays." \
        "Nothing is submitted."
}

array_numbers() { # array_numbers: those of --array, each once and in order, are in numbers
    local part list=${array%%\%*} limit=${array#"${array%%\%*}"} first last step number
    [[ -z $limit || $limit =~ ^%[1-9][0-9]{0,6}$ ]] || fail "--array=$array is no list of numbers; nothing is submitted."
    local -A found=()
    while read -r part; do
        [[ $part =~ ^([0-9]{1,7})(-([0-9]{1,7})(:([1-9][0-9]{0,6}))?)?$ ]] ||
            fail "--array=$array is no list of numbers; nothing is submitted."
        first=$((10#${BASH_REMATCH[1]})) last=$((10#${BASH_REMATCH[3]:-${BASH_REMATCH[1]}})) step=$((10#${BASH_REMATCH[5]:-1}))
        ((first <= last)) || fail "--array=$array counts down; nothing is submitted."
        for ((number = first; number <= last; number += step)); do
            found[$number]=true
        done
    done < <(tr ',' '\n' <<< "$list")
    mapfile -t numbers < <(printf '%s\n' "${!found[@]}" | sort --numeric-sort)
}

site_options() { # options: what site.sh asks of SLURM, then what the command line asks
    options=(--output="$SITE_LOGS/%x-%j.log" --open-mode=append)
    [[ -z $SITE_ACCOUNT ]] || options+=(--account="$SITE_ACCOUNT")
    [[ -z $SITE_PARTITION ]] || options+=(--partition="$SITE_PARTITION")
    [[ -z $SITE_QOS ]] || options+=(--qos="$SITE_QOS")
    [[ -z $SITE_CONSTRAINT ]] || options+=(--constraint="$SITE_CONSTRAINT")
    [[ -z $SITE_RESERVATION ]] || options+=(--reservation="$SITE_RESERVATION")
    [[ -z $SITE_EXCLUDE ]] || options+=(--exclude="$SITE_EXCLUDE")
    [[ -z $SITE_MEMORY_PER_NODE ]] || options+=(--mem="$SITE_MEMORY_PER_NODE")
    split_line "$SITE_SBATCH_OPTIONS"
    options+=("${words_of_line[@]}")
}

gpus_of_node() { # gpus_of_node COUNT: as sbatch is asked for them
    echo "${SITE_GPU_TYPE:+$SITE_GPU_TYPE:}$1"
}

task_options() { # options: of a job with a task for every GPU. SLURM is not told of tasks: it would insist on their number when it
    # starts a job again with fewer nodes.
    options+=(--mincpus="$((tasks_per_node * ${SITE_CPUS_PER_TASK:-1}))" --gpus-per-node="$(gpus_of_node "$SITE_GPUS_PER_NODE")")
    export RMOE_TASKS_PER_NODE=$tasks_per_node
}

submit() { # submit SCRIPT ARGUMENTS...: with options and sbatch_options; prints sbatch's answer, sets submitted
    local answer
    export RMOE_ROOT
    if $is_dry_run; then
        print_job "$@"
        submitted=JOB
        return
    fi
    mkdir -p "$SITE_LOGS"
    answer=$(sbatch "${options[@]}" "${sbatch_options[@]}" "$@")
    # shellcheck disable=SC2034 # pipeline.sh reads it
    submitted=${answer##* }
    echo "$answer"
    echo "$(basename "$1" .sh) prints to $SITE_LOGS" >&2
}

print_job() { # print_job SCRIPT ARGUMENTS...: the job script as it is submitted, which sbatch takes as it is
    local script=$1 option name own
    shift
    echo '#!/usr/bin/env bash'
    own=" $(printf '%s ' "${options[@]%%=*}" "${sbatch_options[@]%%=*}")"
    while read -r option; do
        name=${option%%=*}
        [[ $own == *" $name "* ]] || echo "#SBATCH $option"
    done < <(sed -n 's/^#SBATCH //p' "$script")
    for option in "${options[@]}" "${sbatch_options[@]}"; do
        if [[ $option == *[[:space:]]* ]]; then
            option="${option%%=*}=\"${option#*=}\""
        fi
        echo "#SBATCH $option"
    done
    for name in $(compgen -v | grep --extended-regexp '^(SITE_|RMOE_|NCCL_|GLOO_|MASTER_|HF_)'); do
        printf 'export %s=%q\n' "$name" "${!name}"
    done
    printf 'set --'
    printf ' %q' "$@"
    printf '\n'
    sed '1d; /^#SBATCH /d' "$script"
}

load_modules() { # load_modules: those of SITE_MODULES, whatever kind of modules this cluster has
    local file
    [[ -n $SITE_MODULES ]] || return 0
    split_line "$SITE_MODULES"
    set +u # the shell code of modules is not made for it
    for file in /etc/profile.d/{lmod,z00_lmod,modules}.sh "${MODULESHOME:-/usr/share/modules}/init/bash"; do
        if ! type module > /dev/null 2>&1 && [[ -r $file ]]; then
            # shellcheck source=/dev/null
            source "$file"
        fi
    done
    type module > /dev/null 2>&1 || fail "SITE_MODULES is $SITE_MODULES, but there is no \`module\` on $(hostname)."
    module load "${words_of_line[@]}" || fail "\`module load $SITE_MODULES\` does not work on $(hostname)."
    set -u
}

rmoe_on_login_node() { # rmoe_on_login_node ARGUMENTS...; 127 if there is no rmoe here
    if [[ $SITE_CONTAINER_RUNTIME == apptainer ]]; then
        (load_modules && exec apptainer exec --bind "$SITE_CONTAINER_MOUNTS" "$SITE_CONTAINER_IMAGE" rmoe "$@")
        return
    fi
    (load_modules && activate_environment && command -v rmoe > /dev/null || exit 127; CUDA_VISIBLE_DEVICES='' rmoe "$@")
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
    report=$(rmoe_on_login_node train "$@" --check --ranks $((most_nodes * tasks_per_node)) ${SITE_GPU_MODEL:+--gpu "$SITE_GPU_MODEL"}) || code=$?
    if [[ $code == 127 ]]; then
        echo "not checked: there is no rmoe on this node (SITE_VENV, SITE_CONTAINER_RUNTIME); the job checks first." >&2
    elif [[ $code != 0 ]]; then
        echo "nothing is submitted." >&2
        exit "$code"
    else
        run_dir=$(sed -n 's/^# run folder: //p' <<< "$report")
        sed -n 's/^# \(memory of .*\)/\1/p' <<< "$report" >&2
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

is_in_container() { # is_in_container FOLDER: jobs see it under the same name
    local mount
    [[ -n $SITE_CONTAINER_RUNTIME ]] || return 0
    while read -r mount; do
        if [[ ${mount%%:*} == "${mount#*:}" && $1/ == "${mount%%:*}"/* ]]; then return 0; fi
    done < <(mounts '\n')
    return 1
}

keep_configuration() { # keep_configuration FILE: kept is a copy of it as it is now, for it may change while the job waits
    kept=$1
    [[ -r $1 ]] || fail "there is no configuration $1; nothing is submitted."
    if ! is_in_container "$SITE_LOGS"; then
        echo "the job reads $1 as it is when it starts: the container does not see SITE_LOGS (SITE_CONTAINER_MOUNTS)." >&2
    elif ! $is_dry_run; then
        mkdir -p "$SITE_LOGS"
        kept=$(mktemp "$SITE_LOGS/$(basename "${1%.yaml}")-XXXXXX.yaml")
        cat "$1" > "$kept"
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
    refuse_array "$script"
    training_arguments "$config" "${words[@]}"
    check_training "${arguments[@]}"
    if [[ ${arguments[0]} != --resume ]]; then
        keep_configuration "${arguments[0]}"
        arguments[0]=$kept
    fi
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
    local line every
    mapfile -t every < <(sed $'1s/^\xef\xbb\xbf//' "$1")
    lines=()
    for line in "${every[@]}"; do
        split_line "$line"
        [[ ${#words_of_line[@]} == 0 ]] || lines+=("$line")
    done
}

submit_sweep() { # submit_sweep SCRIPT ARGUMENTS...: check every line, submit an array
    local script=$1 number copy sweep_dir
    shift
    nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$script")
    split_arguments "$@"
    [[ ${#words[@]} -ge 2 && -f ${words[1]} ]] || fail "a configuration and a file of overrides are needed; nothing is submitted."
    read_sweep "${words[1]}"
    [[ ${#lines[@]} -gt 0 ]] || fail "${words[1]} has no line of overrides; nothing is submitted."
    array=${array:-0-$((${#lines[@]} - 1))}
    array_numbers
    ((numbers[-1] < ${#lines[@]})) ||
        fail "--array=$array asks for line ${numbers[-1]}, but ${words[1]} has lines 0 to $((${#lines[@]} - 1)); nothing is submitted."
    training_arguments "${words[0]}" "${words[0]}" "${words[@]:2}"
    check_training "${arguments[@]}"
    sweep_dir=$run_dir
    [[ -n $sweep_dir ]] || fail "where the runs will lie is not known on this node (see above); nothing is submitted."
    for number in "${numbers[@]}"; do
        split_line "${lines[number]}"
        check_training "${arguments[@]}" "${words_of_line[@]}" "run_dir=$sweep_dir-$number"
        echo "line $number is fine: ${lines[number]}" >&2
    done
    keep_configuration "${words[0]}"
    copy=${words[1]}
    if ! $is_dry_run; then # as the configuration
        copy=$(mktemp "$SITE_LOGS/sweep-XXXXXX")
        printf '%s\n' "${lines[@]}" > "$copy"
    fi
    site_options
    task_options
    options+=(--output="$SITE_LOGS/%x-%A_%a.log" --array="$array" --nodes="$nodes")
    options+=(--signal="B:USR1@$SITE_SIGNAL_SECONDS" --requeue)
    RMOE_RUN_DIR=$sweep_dir submit "$script" "$kept" "$copy" "${words[@]:2}"
}

# ----------------------------------------------------------------------------------------------------------------------- job

# This job as SLURM's commands are to be asked for it. The last task of an array has the number of the whole array as its own.
this_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}
this_job=${this_job:-${SLURM_JOB_ID:-}}

mounts() { # mounts SEPARATOR: of the container, each as OUTSIDE:INSIDE
    tr ',' '\n' <<< "$SITE_CONTAINER_MOUNTS" | sed '/:/!s/.*/&:&/' | paste --serial --delimiters="$1"
}

# What a task does to be in enroot's container, which gets none of its variables by itself: enter_enroot FOLDER IMAGE OPTIONS... -- COMMAND...
# shellcheck disable=SC2016 # the tasks' shells expand it
enter_enroot='folder=$1 image=$2 options=()
shift 2
while [[ $1 != -- ]]; do options+=("$1"); shift; done
shift
for name in $(compgen -e | grep --extended-regexp "^(SLURM|SITE|RMOE|MASTER|HF|NCCL|GLOO|TORCH|TRITON|OMP|CUDA|NVIDIA|TOKENIZERS|WANDB)_?"); do
    options+=(--env "$name")
done
exec enroot start "${options[@]}" "$image" sh -c "cd \"\$1\" && shift && exec \"\$@\"" sh "$folder" "$@"'

in_tasks() { # in_tasks SRUN_OPTIONS... -- COMMAND...: run a command in tasks, in the site's container or environment
    local options=() mount more=()
    while [[ $1 != -- ]]; do
        options+=("$1")
        shift
    done
    shift
    load_modules
    split_line "$SITE_CONTAINER_OPTIONS"
    more=("${words_of_line[@]}")
    case $SITE_CONTAINER_RUNTIME in
        pyxis)
            exec srun "${options[@]}" --container-image="$SITE_CONTAINER_IMAGE" --container-mounts="$(mounts ,)" \
                --no-container-mount-home --container-workdir="$PWD" "${more[@]}" "$@"
            ;;
        enroot)
            while read -r mount; do
                more+=(--mount "$mount")
            done < <(mounts '\n')
            export NVIDIA_VISIBLE_DEVICES=${NVIDIA_VISIBLE_DEVICES:-all} # those that SLURM leaves to the task
            export NVIDIA_DRIVER_CAPABILITIES=${NVIDIA_DRIVER_CAPABILITIES:-compute,utility}
            exec srun "${options[@]}" bash -c "$enter_enroot" enter_enroot "$PWD" "$SITE_CONTAINER_IMAGE" "${more[@]}" -- "$@"
            ;;
        apptainer)
            exec srun "${options[@]}" apptainer exec --nv --bind "$SITE_CONTAINER_MOUNTS" --pwd "$PWD" "${more[@]}" \
                "$SITE_CONTAINER_IMAGE" "$@"
            ;;
        '')
            activate_environment
            command -v rmoe > /dev/null || fail "there is no rmoe in this job; see SITE_VENV and activate_environment in site.sh."
            exec srun "${options[@]}" "$@"
            ;;
        *) fail "SITE_CONTAINER_RUNTIME=$SITE_CONTAINER_RUNTIME is neither pyxis nor enroot nor apptainer nor empty." ;;
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
    if [[ -z ${SLURM_JOB_END_TIME:-} ]] && end=$(date -d "$(squeue --noheader --jobs "$this_job" --format=%e)" +%s 2> /dev/null)
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
    refuse_array "$script"
    site_options
    options+=(--gpus-per-node="$(gpus_of_node $((SITE_GPUS_PER_NODE > 0 ? gpus : 0)))")
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
    refuse_array "$script"
    site_options
    task_options
    [[ -z $nodes ]] || options+=(--nodes="$nodes")
    submit "$script" "${words[@]}"
}

find_part() { # find_part NUMBER FIRST LAST COUNT: part is K/N, which part of how many a task of an array of so many numbers has
    local number=$(($1 - $2)) step=$(($4 > 1 ? ($3 - $2) / ($4 - 1) : 1))
    if ((step * ($4 - 1) != $3 - $2 || number % step != 0)); then
        fail "the numbers of this array ($4 from $2 to $3, $1 among them) do not lie at equal distances, so its tasks have no parts;" \
            "submit it with --array=0-$(($4 - 1))."
    fi
    part=$((number / step))/$4
}

precompute_job() { # precompute_job SCRIPT ARGUMENTS...: check and submit rmoe data precompute, or run a part of it
    local script=$1 part number
    shift
    if is_job; then
        find_part "${SLURM_ARRAY_TASK_ID:-0}" "${SLURM_ARRAY_TASK_MIN:-0}" "${SLURM_ARRAY_TASK_MAX:-0}" "${SLURM_ARRAY_TASK_COUNT:-1}"
        (in_all_tasks --kill-on-bad-exit=1 -- rmoe data precompute "$@" --part "$part")
        return
    fi
    split_arguments "$@"
    [[ ${#words[@]} -ge 3 ]] || fail "a configuration, SOURCE and OUT are needed; nothing is submitted."
    array=${array:-${SBATCH_ARRAY_INX:-$(sed -n 's/^#SBATCH --array=//p' "$script")}}
    array_numbers
    for number in "${numbers[@]}"; do
        find_part "$number" "${numbers[0]}" "${numbers[-1]}" "${#numbers[@]}"
    done
    check_precompute "${words[@]}"
    keep_configuration "${words[0]}"
    words[0]=$kept
    site_options
    task_options
    options+=(--output="$SITE_LOGS/%x-%A_%a.log" --array="$array")
    [[ -z $nodes ]] || options+=(--nodes="$nodes")
    submit "$script" "${words[@]}"
}

sweep_job() { # sweep_job SCRIPT CONFIG LINES ARGUMENTS...: check and submit, or train one line
    local script=$1 number=${SLURM_ARRAY_TASK_ID:-}
    shift
    if ! is_job; then
        submit_sweep "$script" "$@"
        return
    fi
    read_sweep "$2"
    [[ -n $number && $number -lt ${#lines[@]} && -n ${RMOE_RUN_DIR:-} ]] ||
        fail "a sweep is submitted with slurm/sweep.sh, as an array with a number for every line ('$number' is none)."
    split_line "${lines[number]}"
    RMOE_RUN_DIR=$RMOE_RUN_DIR-$number
    train_in_job "$1" "${@:3}" "${words_of_line[@]}" "run_dir=$RMOE_RUN_DIR"
}

train_in_job() { # train_in_job ARGUMENTS...: of rmoe train; ends the job
    local code=0 signalled=false is_cancelled=false process='' reporter='' watcher='' ended
    # The time is nearly up: srun hands the signal on to all ranks, which save and exit with 75. Before there are ranks it says
    # nothing that they will not see themselves.
    trap 'signalled=true; [[ -z $process ]] || kill -USR1 "$process"' USR1
    # The job is cancelled or preempted: SLURM tells the ranks itself, and decides itself whether to start it again.
    trap 'signalled=true; is_cancelled=true' TERM
    set_end_time
    find_run_dir "$@"
    mark_start
    if ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ $1 != --resume ]] && was_started_by_this_job; then
        set -- --resume "$run_dir" "${@:2}"
    fi
    check_nodes
    # SLURM says the largest exit code of all ranks, which is that of ranks it had to end. So a rank that ends with a mistake leaves a
    # file. Signals are for rmoe, which gets them too.
    export RMOE_MISTAKE=$run_dir/jobs/$this_job.mistake
    # shellcheck disable=SC2016 # the tasks' shells expand it
    local noting='trap : USR1 TERM HUP; "$@"; code=$?; [ "$code" != 2 ] || : > "$RMOE_MISTAKE"; exit "$code"'
    ended=$run_dir/jobs/$this_job.ended
    rm -f "$RMOE_MISTAKE" "$ended"
    # Ranks that fail end each other and say why; SLURM waits a minute for that before it ends them.
    (in_all_tasks --kill-on-bad-exit=0 --wait=60 -- sh -c "$noting" sh rmoe train "$@") &
    process=$!
    end_srun_after_run "$process" "$ended" &
    watcher=$!
    if ((SITE_COMMENT_SECONDS > 0)); then
        comment_on_job "$run_dir" &
        reporter=$!
    fi
    signalled=false
    wait "$process" || code=$?
    while $signalled; do # a signal ends the waiting, not what is waited for
        signalled=false code=0
        wait "$process" || code=$?
    done
    kill "$watcher" ${reporter:+"$reporter"} 2> /dev/null || true
    if [[ -s $ended ]]; then
        code=$(< "$ended")
        echo "srun did not notice that the ranks of job $this_job have ended, as their history says: was a slurmstepd killed?" >&2
    fi
    if [[ $code != 0 && -e $RMOE_MISTAKE ]]; then
        code=2
    fi
    end_or_start_anew "$code" "$is_cancelled"
}

end_srun_after_run() { # end_srun_after_run PROCESS FILE: srun waits for ever for a step whose slurmstepd was killed; its ranks go on, and say
    # in the run's history that they have ended. Then srun is killed, and the code that it should have is in FILE.
    local seen=0 line code
    while ((seen < 6)) && sleep 20; do # --wait gives srun a minute
        line=$(tail -n 1 "$run_dir/history.jsonl" 2> /dev/null) || line=''
        case $line in
            '{"event": "finished"'*"\"job\": \"$SLURM_JOB_ID\", \"restart\": ${SLURM_RESTART_COUNT:-0}}") code=0 ;;
            '{"event": "interrupted"'*"\"job\": \"$SLURM_JOB_ID\", \"restart\": ${SLURM_RESTART_COUNT:-0}}") code=75 ;;
            '{"event": "failed"'*"\"job\": \"$SLURM_JOB_ID\", \"restart\": ${SLURM_RESTART_COUNT:-0}}") code=1 ;;
            *) code='' ;;
        esac
        seen=$((${#code} > 0 ? seen + 1 : 0))
    done
    echo "$code" > "$2"
    kill -KILL "$1"
}

mark_start() { # mark_start: what lies in run_dir and is older than the mark of a job's first start is not of this job
    local mark=$run_dir/jobs/$this_job.start
    if [[ ! -e $mark || ${SLURM_RESTART_COUNT:-0} == 0 ]]; then
        mkdir -p "$run_dir/jobs" && touch "$mark" || true # what cannot be written, rmoe says
    fi
}

was_started_by_this_job() { # the configuration in run_dir says who has written it; one that does not must be younger than this job
    local line=''
    [[ -f $run_dir/config.yaml ]] || return
    read -r line < "$run_dir/config.yaml" || true
    case $line in
        "# written by job $SLURM_JOB_ID") return 0 ;;
        "# written by "*) return 1 ;;
        *) [[ $run_dir/config.yaml -nt $run_dir/jobs/$this_job.start ]] ;;
    esac
}

comment_on_job() { # comment_on_job RUN: keep squeue's comment at what the run says of itself
    while sleep "$SITE_COMMENT_SECONDS"; do
        if [[ -f $1/status ]]; then
            scontrol update JobId="$this_job" Comment="$(head -c 200 "$1/status")" > /dev/null 2>&1 || true
        fi
    done
}

newest_checkpoint() { # newest_checkpoint: the last one in run_dir that another job has not written, else none, is in newest
    local folder state
    newest=none
    for folder in "$run_dir"/checkpoints/step-????????; do
        state=$folder/run_state.json
        if [[ -d $folder ]] && { [[ ! -f $state ]] || grep --quiet "\"job\": \"$SLURM_JOB_ID\"" "$state"; }; then
            newest=${folder##*/}
        fi
    done
}

end_or_start_anew() { # end_or_start_anew CODE IS_CANCELLED: of the run in run_dir
    local code=$1 is_cancelled=$2
    if [[ $code == 0 ]]; then
        exit
    fi
    if [[ $code == 2 ]]; then
        echo "job $this_job ends after a mistake, see above; it is not started again." >&2
        exit 2
    fi
    if $is_cancelled; then
        echo "job $this_job was ended by SLURM (exit code $code); the run in $run_dir can be resumed." >&2
        exit "$code"
    fi
    start_anew "$code"
}

start_anew() { # start_anew CODE [NODES]: let SLURM start this job again, without some nodes, unless it has done so too often
    local code=$1 without=${2:-} newest same job
    newest_checkpoint
    if ! { mkdir -p "$run_dir" && echo "$this_job $newest $code" >> "$run_dir/restarts"; }; then
        echo "error: restarts of job $this_job cannot be counted in $run_dir/restarts; it ends after exit code $code." >&2
        exit "$code"
    fi
    # How many lines of this job with the same newest checkpoint are the last of its own.
    same=$(awk -v job="$this_job" -v line="$this_job $newest" \
        '$1 == job { n = $1 " " $2 == line ? n + 1 : 0 } END { print n + 0 }' "$run_dir/restarts")
    if ((same > SITE_MAX_RESTARTS)); then
        echo "error: job $this_job was started again $SITE_MAX_RESTARTS times without a new checkpoint of its own (the newest is" \
            "$newest, the last exit code $code); it ends, see above why." >&2
        exit "$code"
    fi
    # On a lost node this script may outlive the loss, after which SLURM has started the job again itself.
    job=$(scontrol --oneliner show job "$this_job")
    if [[ $job == *" JobState=RUNNING "* && $job == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]; then
        echo "job $this_job starts anew after exit code $code, restart $same of $SITE_MAX_RESTARTS without a new checkpoint." >&2
        requeue "$job" "$without" ||
            echo "error: SLURM does not start job $this_job again; resume the run with slurm/pretrain_t2i.sh --resume $run_dir." >&2
    fi
    exit "$code"
}

requeue() { # requeue DESCRIPTION NODES: DESCRIPTION is scontrol's of this job, NODES may be empty
    local before
    if [[ -z $2 ]]; then
        scontrol requeue "$this_job"
        return
    fi
    before=$(sed -n 's/.* ExcNodeList=\([^ ]*\) .*/\1/p' <<< "$1" | grep --invert-match '(null)' || true)
    trap '' TERM # of the job's end, which SLURM brings about now; only a job that waits can be told of nodes
    scontrol requeuehold "$this_job" || return
    scontrol update JobId="$this_job" ExcNodeList="${before:+$before,}$2" || echo "error: SLURM does not exclude $2." >&2
    scontrol release "$this_job"
}

check_nodes() { # check_nodes: before the ranks train, if the site wants it; ends the job where a node is bad
    local report=$run_dir/jobs/$this_job.bad_nodes names node code=0 bad=''
    [[ $SITE_PREFLIGHT == 1 ]] || return 0
    mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    rm -f "$report"
    for node in "${names[@]}"; do # one that starts no task would keep all others from starting
        (timeout 120 srun --nodes=1 --ntasks=1 --nodelist="$node" true || echo "$node starts no task" >> "$report") &
    done
    wait
    if [[ ! -s $report ]]; then
        (in_all_tasks --kill-on-bad-exit=0 --wait=60 -- rmoe diagnose nodes "$run_dir/jobs" --report "$report" \
            --names "${names[*]}" --gpus "$SITE_GPUS_PER_NODE" --min-bandwidth "$SITE_MIN_BANDWIDTH" \
            --min-free-disk "$SITE_MIN_FREE_DISK" --max-clock-skew "$SITE_MAX_CLOCK_SKEW") || code=$?
        [[ $code != 0 ]] || return 0
        [[ -s $report ]] || end_or_start_anew "$code" "$is_cancelled"
    fi
    sed 's/^/error: node /' "$report" >&2
    bad=$(cut -d ' ' -f 1 "$report" | sort --unique | paste --serial --delimiters=,)
    if ((${#names[@]} > 1 && $(tr ',' '\n' <<< "$bad" | wc -l) == ${#names[@]})); then
        fail "no node of job $this_job is as site.sh wants it (SITE_PREFLIGHT), so none is excluded and it is not started again."
    fi
    start_anew 1 "$bad"
}
