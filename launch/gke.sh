#!/usr/bin/env bash
# Starts a command on TPU slices of a GKE cluster that has JobSet: launch/gke_jobset.yaml, filled in.
#
#   launch/gke.sh [--dry-run] NAME ACCELERATOR TOPOLOGY SLICES IMAGE BUCKET COMMAND...
#   launch/gke.sh run1 tpu-v6e-slice 4x4 2 us-docker.pkg.dev/p/r/popi_jax gs://my-bucket make train ACCEL=tpu
#
# WORKDIR=BUCKET/NAME is added to the command, and the compilation cache is BUCKET/compiled. --dry-run prints the YAML,
# which else goes to kubectl. CHIPS is the number of chips of a host (default 4), RESTARTS how often a run that failed or
# was preempted starts again (default 50).
set -euo pipefail

dry_run=false
if [[ ${1:-} == --dry-run ]]; then
  dry_run=true
  shift
fi
if (($# < 7)); then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 accelerator=$2 topology=$3 slices=$4 image=$5 bucket=${6%/} chips=${CHIPS:-4}
shift 6
if ! [[ $topology =~ ^[0-9]+(x[0-9]+)+$ && $slices$chips =~ ^[0-9]+$ ]] || (((${topology//x/*}) % chips)); then
  echo "error: TOPOLOGY $topology (like 4x4), SLICES $slices, CHIPS $chips: must be numbers, and CHIPS divide a slice" >&2
  exit 2
fi

# each word in double quotes, as YAML and JSON write it
words=
for word in "$@" "WORKDIR=$bucket/$name"; do
  word=${word//\\/\\\\}
  words+="${words:+, }\"${word//\"/\\\"}\""
done
yaml=$(<"$(dirname "$0")/gke_jobset.yaml")
yaml=${yaml//@NAME@/"$name"}
yaml=${yaml//@ACCELERATOR@/"$accelerator"}
yaml=${yaml//@TOPOLOGY@/"$topology"}
yaml=${yaml//@SLICES@/"$slices"}
yaml=${yaml//@HOSTS@/"$(((${topology//x/*}) / chips))"}
yaml=${yaml//@CHIPS@/"$chips"}
yaml=${yaml//@IMAGE@/"$image"}
yaml=${yaml//@RESTARTS@/"${RESTARTS:-50}"}
yaml=${yaml//@CACHE@/"$bucket/compiled"}
yaml=${yaml//@COMMAND@/"[$words]"}
if $dry_run; then
  printf '%s\n' "$yaml"
else
  printf '%s\n' "$yaml" | kubectl apply -f -
fi
