#!/usr/bin/env bash
# Runs one config on this machine, on all the devices that JAX sees.
#
# Usage: CONFIG=configs/e2e.py WORKDIR=runs/e2e bash launch/run_local.sh \
#            [--config.seed=1 ...]
# Environment: EXTRA=cuda or tpu installs JAX for that accelerator first.
# PROCESSES=4 starts one run in so many processes, which is for trying out on
# the CPU what pods do; PORT is where they meet, by default one that is free.
# What is taken away or crashes begins again; see mcpo_jax/supervise.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
: "${CONFIG:?the config file}"
: "${WORKDIR:?the folder of the run}"

bash launch/setup.sh "${EXTRA:-}"
# Large pages for large arrays: a quarter less CPU time, where glibc has it.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
# Vectors of 512 bits where the processor has them: attention takes an eighth
# less CPU time.
export XLA_FLAGS="--xla_cpu_prefer_vector_width=512 ${XLA_FLAGS:-}"
python="${MCPO_VENV:-.venv}/bin/python"
exec "$python" -m mcpo_jax.supervise --processes="${PROCESSES:-1}" -- \
  "$python" -m mcpo_jax train --config="$CONFIG" --workdir="$WORKDIR" "$@"
