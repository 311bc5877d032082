#!/usr/bin/env bash
# Installs requirements.lock into .venv; called by the Makefile as: launch/make_venv.sh cpu|cuda13|tpu [python]
# Leaves the stamp .venv/.installed-<accelerator> only when all went well. uv is quicker and used where it is there; pip
# takes over where uv fails, with whatever indexes pip is configured for.
set -euo pipefail

accelerator=$1
stamp=.venv/.installed-$accelerator
rm -f .venv/.installed-*

new_enough='import sys; sys.exit(sys.version_info < (3, 11))'
candidates=(python3.12 python3.11 python3)
if [[ -n ${2:-} ]]; then
  candidates=("$2")
fi
python=
for candidate in "${candidates[@]}"; do
  if "$candidate" -c "$new_enough" 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [[ -z $python ]]; then
  echo "error: no Python of at least 3.11 among: ${candidates[*]}; name one: make setup PYTHON=/path/to/python3.12" >&2
  exit 1
fi

if ! .venv/bin/python -c "import pip; $new_enough" 2>/dev/null; then
  echo "making .venv with $("$python" --version)"
  rm -rf .venv
  if ! "$python" -m venv .venv; then
    rm -rf .venv
    echo "error: $python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
    exit 1
  fi
fi

packages=(-r requirements.lock)
if [[ $accelerator != cpu ]]; then
  packages+=("jax[$accelerator]==$(sed -n 's/^jax==//p' requirements.lock)")
fi
echo "installing $(grep -c == requirements.lock || true) packages, about 1 GB, into .venv"
if command -v uv >/dev/null && uv pip install --quiet --python .venv/bin/python "${packages[@]}"; then
  touch "$stamp"
  exit
fi
count='/^Collecting/ { printf "\r  %d found", ++n } /^Installing/ { printf "\n  unpacking" } { fflush() } END { print "" }'
if ! .venv/bin/python -m pip install --disable-pip-version-check --progress-bar off "${packages[@]}" | awk "$count"; then
  echo "error: installing failed for the reason above; once it is mended, run make setup again" >&2
  exit 1
fi
touch "$stamp"
