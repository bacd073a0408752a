#!/bin/sh
# Start or stop a real SLURM of one node on this host, for tests/test_sweeps.py: as root, with Debian's slurm-wlm and munge.
#   sh tests/slurm.sh start [CPUS]    sh tests/slurm.sh stop
# Its configuration goes where SLURM looks by default, so that jobs find it too; one that is there already is left alone.
set -eu
CONF=/etc/slurm/slurm.conf
STATE=/var/lib/slurm-workbook
MARK="# written by the workbook's tests/slurm.sh"

start() {
    cpus="${1:-$(nproc)}"
    if [ -e "$CONF" ] && ! head -n 1 "$CONF" | grep -qxF "$MARK"; then
        echo "$CONF belongs to another cluster" >&2
        exit 1
    fi
    mkdir -p "$STATE/ctld" "$STATE/d" /etc/slurm /run/munge
    [ -s /etc/munge/munge.key ] || head -c 1024 /dev/urandom > /etc/munge/munge.key
    chown -R munge: /etc/munge /run/munge
    chmod 400 /etc/munge/munge.key
    munge -n > /dev/null 2>&1 || setpriv --reuid=munge --regid=munge --clear-groups munged --force
    cat > "$CONF" <<EOF
$MARK
ClusterName=workbook
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2
MinJobAge=600
ReturnToService=2
StateSaveLocation=$STATE/ctld
SlurmdSpoolDir=$STATE/d
SlurmctldPidFile=$STATE/slurmctld.pid
SlurmdPidFile=$STATE/slurmd.pid
SlurmctldLogFile=$STATE/slurmctld.log
SlurmdLogFile=$STATE/slurmd.log
NodeName=$(hostname) NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=16000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
EOF
    slurmctld -c
    slurmd
    for _ in $(seq 60); do
        sinfo --noheader --format %t 2> /dev/null | grep -q idle && exit 0
        sleep 0.5
    done
    tail -n 20 "$STATE"/*.log >&2
    exit 1
}

stop() {
    for name in slurmd slurmctld; do
        [ ! -e "$STATE/$name.pid" ] || kill "$(cat "$STATE/$name.pid")" 2> /dev/null || true
    done
    if [ -e "$CONF" ] && head -n 1 "$CONF" | grep -qxF "$MARK"; then
        rm -f "$CONF"
    fi
    sleep 1
    rm -rf "$STATE"
}

"$@"
