#!/usr/bin/env bash
# Runs one config on all the workers of a TPU slice.
#
# Usage: TPU_NAME=my-v5e-64 ZONE=us-west4-a CONFIG=configs/e2e.py \
#            WORKDIR=/mnt/shared/runs/e2e bash launch/tpu_pod.sh \
#            [--config.seed=1 ...]
# Each worker has the checkout in CHECKOUT (mcpo_jax, in the home folder). WORKDIR
# lies on a file system that all of them mount, or on the disk of each, and then
# --config.checkpoint.mirror=gs://BUCKET/RUN is where checkpoints meet and
# EXTRA=tpu,gcs has what reads it. The same line resumes.
set -euo pipefail
: "${TPU_NAME:?the name of the TPU}"
: "${ZONE:?its zone}"
: "${CONFIG:?the config file, in the checkout}"
: "${WORKDIR:?the folder of the run}"

printf -v flags ' %q' "$@"
printf -v line 'cd %q && MCPO_COORDINATOR=auto EXTRA=%q CONFIG=%q WORKDIR=%q' \
  "${CHECKOUT:-mcpo_jax}" "${EXTRA:-tpu}" "$CONFIG" "$WORKDIR"
if (($# == 0)); then
  flags=""
fi
exec gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone="$ZONE" --worker=all \
  --command="$line bash launch/run_local.sh$flags"
