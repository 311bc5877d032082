#!/usr/bin/env bash
# Submits a command to TPU slices of a GKE cluster that xpk made.
#
#   launch/xpk.sh [--dry-run] NAME CLUSTER TYPE SLICES IMAGE COMMAND...
#   launch/xpk.sh run1 my-cluster v6e-16 2 us-docker.pkg.dev/p/r/popi_jax make train ACCEL=tpu WORKDIR=gs://my-bucket/run1
#
# ZONE and PROJECT name the zone and the project where they are not gcloud's defaults; RESTARTS (default 50) how often a
# preempted workload starts again. --dry-run prints what would run.
set -euo pipefail

dry_run=false
if [[ ${1:-} == --dry-run ]]; then
  dry_run=true
  shift
fi
if (($# < 6)); then
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 cluster=$2 type=$3 slices=$4 image=$5
shift 5

command=(
  xpk workload create --workload="$name" --cluster="$cluster" --tpu-type="$type" --num-slices="$slices"
  --docker-image="$image" --max-restarts="${RESTARTS:-50}"
  --restart-on-user-code-failure              # when one host is preempted, the command of the others fails
  --termination-grace-period-seconds=120      # from SIGTERM until the checkpoint is written
  --env=POPI_JAX_JOIN_S=900                   # images are pulled at different speeds
  --command="$(printf '%q ' "$@")"
)
if [[ -n ${ZONE:-} ]]; then
  command+=(--zone="$ZONE")
fi
if [[ -n ${PROJECT:-} ]]; then
  command+=(--project="$PROJECT")
fi
if $dry_run; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
