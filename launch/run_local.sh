#!/usr/bin/env bash
# Runs one config on this machine, on all the devices that JAX sees.
#
# Usage: CONFIG=configs/e2e.py WORKDIR=runs/e2e bash launch/run_local.sh \
#            [--config.seed=1 ...]
# Environment: EXTRA=cuda or tpu installs JAX for that accelerator first.
# PROCESSES=4 starts one run in so many processes, which is for trying out on
# the CPU what pods do; PORT is where they meet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${CONFIG:?the config file}"
: "${WORKDIR:?the folder of the run}"
processes="${PROCESSES:-1}"

bash launch/setup.sh "${EXTRA:-}"
# Large pages for large arrays: a quarter less CPU time, where glibc has it.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
command=("${MCPO_VENV:-.venv}/bin/python" -m mcpo_jax train
  --config="$CONFIG" --workdir="$WORKDIR" "$@")
if [[ "$processes" == 1 ]]; then
  exec "${command[@]}"
fi

export MCPO_COORDINATOR="127.0.0.1:${PORT:-8476}"
export MCPO_NUM_PROCESSES="$processes"
started=()
trap 'kill "${started[@]}"' INT TERM
for ((i = 0; i < processes; i++)); do
  MCPO_PROCESS_ID="$i" "${command[@]}" &
  started+=("$!")
done
code=0
for process in "${started[@]}"; do
  wait "$process" || code="$?"
done
exit "$code"
