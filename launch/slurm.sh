#!/usr/bin/env bash
#SBATCH --job-name=mcpo_jax
# Runs one config on the GPUs of a Slurm allocation, one process for each GPU.
#
# Usage, in the checkout, which all nodes see as they see WORKDIR:
#   CONFIG=configs/e2e.py WORKDIR=runs/e2e sbatch --nodes=4 \
#       --ntasks-per-node=8 --gpus-per-node=8 launch/slurm.sh \
#       [--config.seed=1 ...]
# Environment: EXTRA (cuda) names the accelerator. The same line resumes. What
# crashes begins again; sbatch --signal=USR1@60 saves it before the time is up.
set -euo pipefail
# Slurm runs a copy of this file that lies elsewhere.
cd "${SLURM_SUBMIT_DIR:?call this by sbatch, in the checkout}"
: "${CONFIG:?the config file}"
: "${WORKDIR:?the folder of the run}"

bash launch/setup.sh "${EXTRA:-cuda}"
export MCPO_COORDINATOR=auto
python="${MCPO_VENV:-.venv}/bin/python"
exec srun --kill-on-bad-exit=1 "$python" -m mcpo_jax.supervise -- \
  "$python" -m mcpo_jax train --config="$CONFIG" --workdir="$WORKDIR" "$@"
