#!/usr/bin/env bash
# Starts a command on every node of a Slurm job, one process per node that sees all its GPUs; they find each other.
#
#   sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh make train ACCEL=cuda13 WORKDIR=/shared/run1
#   launch/slurm.sh [--dry-run] COMMAND...        in an allocation of salloc; --dry-run prints what would run
#
# Nodes and GPUs are sbatch's to choose; the lines below are defaults that its flags override. The project, .venv and
# WORKDIR must lie in folders that all nodes share. A job that Slurm preempts is put back into the queue and continues.
#SBATCH --job-name=popi_jax
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -euo pipefail

dry_run=false
if [[ ${1:-} == --dry-run ]]; then
  dry_run=true
  shift
fi
if (($# < 1)); then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi

# a task that fails ends the others at once; --label puts the number of the task before each line
command=(srun --ntasks-per-node=1 --kill-on-bad-exit=1 --label "$@")
if $dry_run; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
