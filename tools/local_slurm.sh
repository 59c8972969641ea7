#!/usr/bin/env bash
# A real SLURM on this host, to try slurm/ before a cluster sees it: slurmctld and some slurmd, all state in one folder.
#   bash tools/local_slurm.sh start FOLDER [NODES] [CPUS_PER_NODE] [GPUS_PER_NODE]
#                                          (default: 2 nodes of 2 CPUs, no GPU; about a second; GPUs are in name only)
#   export SLURM_CONF=FOLDER/slurm.conf                                sbatch, squeue, scontrol ... then ask this one
#   bash tools/local_slurm.sh stop FOLDER
# Needs Debian's or Ubuntu's slurm-wlm; no root, systemd, cgroups or /etc. It takes NODES + 1 ports in a row that are free, looked
# for from RMOE_SLURM_PORT on, or from a random one.
set -euo pipefail

usage() {
    echo "error: $* run tools/local_slurm.sh start FOLDER [NODES] [CPUS_PER_NODE] [GPUS_PER_NODE], or stop FOLDER." >&2
    exit 2
}

find_ports() { # find_ports COUNT: port is the first of so many in a row, from port on, at which nobody listens
    local count=$1 number
    for ((number = port; number < port + count; number++)); do
        if (exec 3<> "/dev/tcp/127.0.0.1/$number") 2> /dev/null; then
            port=$((number + 1)) # and look again from there
        fi
    done
}

write_configuration() { # write_configuration FOLDER NODES CPUS_PER_NODE GPUS_PER_NODE PORT
    local folder=$1 nodes=$2 cpus=$3 gpus=$4 port=$5 user node host device
    user=$(id -un) host=$(hostname -s)
    cat > "$folder/slurm.conf" <<END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# A requeued job waits for its credential's end: 2 minutes by default.
AuthInfo=socket=$folder/run/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
ReturnToService=2
MailProg=/bin/true
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=5
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
MinJobAge=3600
BatchStartTimeout=10
MessageTimeout=10
TCPTimeout=2
UnkillableStepTimeout=30
JobRequeue=1
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/log/jobs
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
PartitionName=main Nodes=n[1-$nodes] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
END
    for ((node = 1; node <= nodes; node++)); do
        mkdir -p "$folder/spool/n$node"
        echo "NodeName=n$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + node)) CPUs=$cpus Boards=1" \
            "SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=1000" \
            "$([[ $gpus == 0 ]] || echo "Gres=gpu:$gpus")" >> "$folder/slurm.conf"
    done
    if [[ $gpus != 0 ]]; then
        echo "GresTypes=gpu" >> "$folder/slurm.conf"
        : > "$folder/gres.conf"
        # SLURM wants a device for each GPU, whatever it is.
        local devices=(/dev/null /dev/zero /dev/full /dev/urandom)
        for device in "${devices[@]:0:gpus}"; do
            echo "NodeName=n[1-$nodes] Name=gpu File=$device" >> "$folder/gres.conf"
        done
    fi
}

start() { # start FOLDER [NODES] [CPUS_PER_NODE] [GPUS_PER_NODE]
    local folder nodes=${2:-2} cpus=${3:-2} gpus=${4:-0} node command
    export PATH=$PATH:/usr/sbin
    for command in munged slurmctld slurmd sinfo; do
        if ! command -v "$command" > /dev/null; then
            echo "error: $command is not installed; run apt-get install slurm-wlm." >&2
            exit 2
        fi
    done
    [[ $nodes =~ ^[1-9][0-9]?$ && $cpus =~ ^[1-9][0-9]?$ ]] || usage "$nodes nodes of $cpus CPUs are no numbers below 100;"
    [[ $gpus =~ ^[0-4]$ ]] || usage "$gpus GPUs a node is no number below 5;"
    folder=$(mkdir -p "$1" && cd "$1" && pwd)
    mkdir -p "$folder"/{state,log,run,spool}
    # munged insists on folders that only their owner can write to; its key and socket are ours alone.
    chmod 755 "$folder" "$folder"/{state,log,run}
    if [[ ! -s $folder/munge.key ]]; then
        (umask 077 && head -c 1024 /dev/urandom > "$folder/munge.key")
    fi
    munged --force --key-file="$folder/munge.key" --socket="$folder/run/munge.socket" \
        --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log" \
        --seed-file="$folder/state/munged.seed" 2> "$folder/log/munged.stderr"
    export SLURM_CONF=$folder/slurm.conf
    # Another start on this host looks for ports when this one has its own; another program may still take one in between.
    exec 9> "${TMPDIR:-/tmp}/local_slurm.$(id -u).lock"
    flock 9
    local port=${RMOE_SLURM_PORT:-$((17000 + RANDOM % 13000))} trial
    for ((trial = 0; trial < 8; trial++)); do
        find_ports $((nodes + 1))
        write_configuration "$folder" "$nodes" "$cpus" "$gpus" "$port"
        rm -f "$folder"/log/slurm*.log
        slurmctld -i 9>&- || true
        for ((node = 1; node <= nodes; node++)); do
            slurmd -N "n$node" 9>&- || true
        done
        if are_up "$folder" "$nodes"; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        grep --quiet --ignore-case 'address already in use' "$folder"/log/slurm*.log || break
        end_processes "$folder"/run/slurmd.*.pid "$folder/run/slurmctld.pid"
        port=$((port + nodes + 1))
    done
    echo "error: the nodes did not come up; see $folder/log." >&2
    stop "$folder"
    exit 1
}

are_up() { # are_up FOLDER NODES: wait until all nodes are idle; fails after 30 s, or when a daemon has ended
    local attempt
    for ((attempt = 0; attempt < 150; attempt++)); do
        [[ $(sinfo -h -N -t idle -o %N 2> /dev/null | wc -l) != "$2" ]] || return 0
        ! grep --quiet --ignore-case --extended-regexp 'fatal:|address already in use' "$1"/log/slurm*.log || return 1
        sleep 0.2
    done
    return 1
}

stop() { # stop FOLDER: end what start began, by the process numbers written there; running jobs are cancelled
    local folder attempt
    [[ -f $1/slurm.conf ]] || usage "there is no SLURM in $1;"
    folder=$(cd "$1" && pwd)
    export SLURM_CONF=$folder/slurm.conf
    if [[ -s $folder/run/slurmctld.pid ]] && kill -0 "$(cat "$folder/run/slurmctld.pid")" 2> /dev/null; then
        scancel --user="$(id -un)" --signal=KILL --full 2> /dev/null || true
        scancel --user="$(id -un)" 2> /dev/null || true
        for ((attempt = 0; attempt < 100; attempt++)); do
            [[ -n $(squeue -h -t running,completing 2> /dev/null) ]] || break
            sleep 0.1
        done
    fi
    end_processes "$folder"/run/slurmd.*.pid "$folder/run/slurmctld.pid" "$folder/run/munged.pid"
}

end_processes() { # end_processes FILE...: those whose numbers the files hold
    local file process attempt processes=()
    for file in "$@"; do
        [[ -s $file ]] || continue
        process=$(cat "$file") # which ends with its process
        if kill "$process" 2> /dev/null; then
            processes+=("$process")
        fi
    done
    for process in "${processes[@]}"; do
        for ((attempt = 0; attempt < 50; attempt++)); do
            kill -0 "$process" 2> /dev/null || break
            sleep 0.1
        done
        kill -9 "$process" 2> /dev/null || true
    done
}

[[ $# -ge 2 && $# -le 5 ]] || usage "$# arguments are not understood;"
case $1 in
    start) start "${@:2}" ;;
    stop) stop "$2" ;;
    *) usage "'$1' is not understood;" ;;
esac
