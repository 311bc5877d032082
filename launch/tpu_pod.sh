#!/usr/bin/env bash
# Starts the same command on every host of a TPU VM slice; the hosts find each other.
#
#   launch/tpu_pod.sh [--dry-run] NAME ZONE COMMAND...
#   launch/tpu_pod.sh my-slice us-east5-a make train ACCEL=tpu WORKDIR=gs://my-bucket/run1
#
# The project must lie in the same folder on every host (REPO, default popi_jax in the home folder), and WORKDIR must be
# one that all hosts see. PROJECT names the cloud project where it is not the default. These variables are passed on when
# set: XLA_FLAGS, LIBTPU_INIT_ARGS, JAX_COMPILATION_CACHE_DIR, POPI_JAX_JOIN_S, POPI_JAX_LOST_S, HF_HOME, HF_ENDPOINT,
# HF_HUB_OFFLINE; a token is not, as it would show in the list of processes.
set -euo pipefail

dry_run=false
if [[ ${1:-} == --dry-run ]]; then
  dry_run=true
  shift
fi
if (($# < 3)); then
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1
zone=$2
shift 2

remote="cd $(printf '%q' "${REPO:-popi_jax}") &&"
for variable in XLA_FLAGS LIBTPU_INIT_ARGS JAX_COMPILATION_CACHE_DIR POPI_JAX_JOIN_S POPI_JAX_LOST_S \
  HF_HOME HF_ENDPOINT HF_HUB_OFFLINE; do
  if [[ -n ${!variable:-} ]]; then
    remote+=" $variable=$(printf '%q' "${!variable}")"
  fi
done
remote+="$(printf ' %q' "$@")"

command=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$remote")
if [[ -n ${PROJECT:-} ]]; then
  command+=(--project="$PROJECT")
fi
if $dry_run; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
