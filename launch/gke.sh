#!/usr/bin/env bash
# Writes a JobSet that runs one config on TPU slices of a GKE cluster.
#
# Usage: NAME=e2e IMAGE=REGISTRY/mcpo_jax CLAIM=runs CONFIG=configs/e2e.py \
#            WORKDIR=/runs/e2e TPU=tpu-v5-lite-podslice TOPOLOGY=4x4 HOSTS=4 \
#            bash launch/gke.sh [--config.seed=1 ...] | kubectl apply -f -
# IMAGE is built of launch/Dockerfile with EXTRA=tpu; CLAIM is a volume claim
# that all pods mount at /runs. Without CLAIM each pod has a disk of its own, and
# --config.checkpoint.mirror=gs://BUCKET/RUN is where checkpoints meet; the image
# then is built with EXTRA=tpu,gcs. Environment: SLICES (1), CHIPS of a host (4).
# A preempted or crashed run starts again as a whole and goes on from its last
# checkpoint; an error of the user's (exit codes 2 to 5), or a loss that is not
# finite (8), ends it.
set -euo pipefail
: "${NAME:?the name of the job}"
: "${IMAGE:?the image, built of launch/Dockerfile with EXTRA=tpu}"
: "${CONFIG:?the config file, in the image}"
: "${WORKDIR:?the folder of the run, under /runs}"
: "${TPU:?the accelerator of the node pool, such as tpu-v5-lite-podslice}"
: "${TOPOLOGY:?the topology of a slice, such as 4x4}"
: "${HOSTS:?the hosts of a slice}"

# JSON strings are YAML strings, whatever stands in them.
quote() {
  local text="${1//\\/\\\\}"
  printf '"%s"' "${text//\"/\\\"}"
}
arguments=""
for argument in "$@"; do
  arguments+="${arguments:+, }$(quote "$argument")"
done

cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(quote "$NAME")
  annotations:  # a slice for each job, and its pods on no other
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 100
    rules:
    - name: ends_for_good
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: workers
    replicas: ${SLICES:-1}
    template:
      spec:
        parallelism: $HOSTS
        completions: $HOSTS
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              operator: In
              values: [2, 3, 4, 5, 8]
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 30
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(quote "$TPU")
              cloud.google.com/gke-tpu-topology: $(quote "$TOPOLOGY")
            containers:
            - name: mcpo-jax
              image: $(quote "$IMAGE")
              args: [$arguments]
              env:
              - {name: MCPO_COORDINATOR, value: auto}
              - {name: CONFIG, value: $(quote "$CONFIG")}
              - {name: WORKDIR, value: $(quote "$WORKDIR")}
              ports:
              - containerPort: 8471
              - containerPort: 8080
              resources:
                limits: {google.com/tpu: ${CHIPS:-4}}
YAML
if [[ -n "${CLAIM:-}" ]]; then
  cat <<YAML
              volumeMounts:
              - {name: runs, mountPath: /runs}
            volumes:
            - name: runs
              persistentVolumeClaim: {claimName: $(quote "$CLAIM")}
YAML
fi
