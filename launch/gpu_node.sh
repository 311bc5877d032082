#!/usr/bin/env bash
# Starts a command on one machine with several NVIDIA GPUs: one process that sees them all.
#
#   launch/gpu_node.sh [--dry-run] COMMAND...
#   launch/gpu_node.sh make train ACCEL=cuda13 WORKDIR=work/run1
#
# CUDA_VISIBLE_DEVICES=0,1 chooses among the GPUs. --dry-run prints what would run. What an earlier launcher left in the
# environment is taken out, so that the process does not wait for others.
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

command=(env -u JAX_COORDINATOR_ADDRESS -u SLURM_STEP_NODELIST -u OMPI_COMM_WORLD_SIZE "$@")
if $dry_run; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
