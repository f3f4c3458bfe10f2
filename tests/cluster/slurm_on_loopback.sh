#!/bin/bash
# A Slurm of two nodes on this machine, for tests/cluster: `slurm_on_loopback.sh start FOLDER` and `... stop FOLDER`.
# It needs Debian's slurm-wlm and munge, and root. Nothing outside FOLDER and munge's own folders is written.
# Each node has one "GPU", a device file that nobody opens: Slurm counts them, and the tests compute on the CPU.
set -e
folder=$2
mkdir -p "$folder/state" "$folder/spool" "$folder/log"

if [ "$1" = stop ]; then
  for file in "$folder"/*.pid; do
    [ -f "$file" ] && kill "$(cat "$file")" 2>/dev/null || true
  done
  exit 0
fi

host=$(hostname -s)
cat > "$folder/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/%n.log
SlurmctldPort=${SLURMCTLD_PORT:-16817}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobRequeue=1
SchedulerParameters=requeue_setup_env_fail,bf_interval=1,sched_interval=1
MinJobAge=3600
KillWait=5
ReturnToService=2
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 Port=16818 CPUs=1 RealMemory=2000 Gres=gpu:1 State=UNKNOWN
NodeName=$host-second NodeHostname=$host NodeAddr=127.0.0.1 Port=16819 CPUs=1 RealMemory=2000 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=$host,$host-second Default=YES MaxTime=INFINITE State=UP
CONF
cat > "$folder/gres.conf" <<CONF
NodeName=$host Name=gpu File=/dev/null
NodeName=$host-second Name=gpu File=/dev/zero
CONF

if ! pgrep -x munged > /dev/null; then
  [ -f /etc/munge/munge.key ] || create-munge-key -f > /dev/null 2>&1 || dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 2> /dev/null
  mkdir -p /run/munge /var/log/munge /var/lib/munge
  chown -R munge: /etc/munge /run/munge /var/log/munge /var/lib/munge
  chmod 700 /etc/munge /var/log/munge && chmod 400 /etc/munge/munge.key && chmod 755 /run/munge
  runuser -u munge -- /usr/sbin/munged
fi
export SLURM_CONF=$folder/slurm.conf
slurmctld
for node in "$host" "$host-second"; do
  mkdir -p "$folder/spool/$node"
  slurmd -N "$node"
done
for _ in $(seq 100); do
  [ "$(sinfo -h -N -t idle -o %N 2> /dev/null | wc -l)" = 2 ] && exit 0
  sleep 0.2
done
cat "$folder"/log/*.log >&2
exit 1
