#!/usr/bin/env bash
# Stands in for srun: starts TASKS processes on this machine, each as if on a node of its own, and waits for all. The
# process ids lie in $PIDS/0, $PIDS/1, … Fails when one of them does.
set -euo pipefail
while [[ $1 == --* ]]; do
  shift
done
export SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=$TASKS SLURM_NTASKS=$TASKS SLURM_LOCALID=0 SLURM_STEP_ID=0
tasks=()
for ((i = 0; i < TASKS; i++)); do
  SLURM_PROCID=$i "$@" >"$PIDS/out.$i" 2>"$PIDS/err.$i" &
  echo $! >"$PIDS/$i"
  tasks+=($!)
done
status=0
for ((i = 0; i < TASKS; i++)); do
  one=0
  wait "${tasks[$i]}" || one=$?
  echo "$one" >"$PIDS/status.$i"
  ((one == 0)) || status=$one
done
exit "$status"
