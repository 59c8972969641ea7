#!/usr/bin/env bash
# A real SLURM on this host, to try slurm/ before a cluster sees it: slurmctld and some slurmd, all state in one folder.
#   bash tools/local_slurm.sh start FOLDER [NODES] [CPUS_PER_NODE] [GPUS_PER_NODE]
#                                          (default: 2 nodes of 2 CPUs, no GPU; about a second; GPUs are in name only)
#   export SLURM_CONF=FOLDER/slurm.conf                                sbatch, squeue, scontrol ... then ask this one
#   bash tools/local_slurm.sh stop FOLDER
# Needs Debian's or Ubuntu's slurm-wlm; no root, systemd, cgroups or /etc. RMOE_SLURM_PORT is the first of NODES + 1 ports.
set -euo pipefail

usage() {
    echo "error: $* run tools/local_slurm.sh start FOLDER [NODES] [CPUS_PER_NODE] [GPUS_PER_NODE], or stop FOLDER." >&2
    exit 2
}

write_configuration() { # write_configuration FOLDER NODES CPUS_PER_NODE GPUS_PER_NODE
    local folder=$1 nodes=$2 cpus=$3 gpus=$4 user node host device
    local port=${RMOE_SLURM_PORT:-17817}
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
    write_configuration "$folder" "$nodes" "$cpus" "$gpus"
    export SLURM_CONF=$folder/slurm.conf
    slurmctld -i
    for ((node = 1; node <= nodes; node++)); do
        slurmd -N "n$node"
    done
    for ((attempt = 0; attempt < 150; attempt++)); do
        if [[ $(sinfo -h -N -t idle -o %N 2> /dev/null | wc -l) == "$nodes" ]]; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.2
    done
    echo "error: the nodes did not come up within 30 s; see $folder/log." >&2
    stop "$folder"
    exit 1
}

stop() { # stop FOLDER: end what start began, by the process numbers written there; running jobs are cancelled
    local folder file process attempt processes=()
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
    for file in "$folder"/run/slurmd.*.pid "$folder"/run/slurmctld.pid "$folder"/run/munged.pid; do
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
