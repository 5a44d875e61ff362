#!/usr/bin/env bash
# A real Slurm on this machine alone, without systemd, for tests: slurm.sh start FOLDER | stop FOLDER
#
# One node of four processors (more than there are, so that jobs wait for each other and not for the machine), and two
# partitions: jobs of "urgent" push those of "normal" off it. Everything it writes lies in FOLDER; after "start",
# SLURM_CONF=FOLDER/slurm.conf is what sbatch and the others need.
set -euo pipefail
folder=$(realpath -m "$2")
host=$(hostname -s)
export SLURM_CONF=$folder/slurm.conf

configuration() {
    cat <<END
ClusterName=stillframe
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
MpiDefault=none
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=2
SchedulerParameters=batch_sched_delay=1,sched_min_interval=200000,bf_interval=2
SlurmdParameters=config_overrides
SlurmctldPort=$1
SlurmdPort=$2
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 RealMemory=12000 State=UNKNOWN
PartitionName=normal Nodes=$host Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=10
END
}

free_ports() {
    python3 -c '
import socket
some = [socket.socket() for _ in range(2)]
for one in some:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in some))'
}

idle() { [ "$(sinfo -h -o %t 2>/dev/null | head -1)" = idle ]; }

start() {
    mkdir -p "$folder"/{state,spool,munge}
    chmod 755 "$folder"/munge
    dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
    chmod 600 "$folder/munge/key"
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" \
        --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
    # shellcheck disable=SC2046
    configuration $(free_ports) >"$SLURM_CONF"
    slurmctld
    slurmd
    for _ in $(seq 300); do
        if idle; then return; fi
        sleep 0.1
    done
    echo "Slurm's node did not become idle within 30 s:" >&2
    tail -n 20 "$folder"/*.log >&2
    return 1
}

stop() {
    scancel --user=root --state=RUNNING,PENDING 2>/dev/null || true
    for name in slurmd slurmctld munge/; do
        pid=$(cat "$folder/${name}$([ "$name" = munge/ ] && echo pid || echo .pid)" 2>/dev/null) || continue
        kill "$pid" 2>/dev/null || true
        for _ in $(seq 100); do
            if ! kill -0 "$pid" 2>/dev/null; then break; fi
            sleep 0.1
        done
    done
}

"$1"
