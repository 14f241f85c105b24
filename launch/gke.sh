#!/usr/bin/env bash
# A run on TPUs of a GKE cluster: puts the code into the bucket and prints a JobSet, which starts a pod a TPU VM and
# starts all of them again when one is lost.
#
#   bash launch/gke.sh job.env -- --config=bert_base | kubectl apply -f -
#   bash launch/gke.sh job.env --dry_run -- --config=bert_base     # uploads nothing, prints the rest
#
# JOB.env is a copy of launch/tpu.env.example; what follows -- is for `train`. The cluster is a Standard one (Autopilot
# has no hostNetwork) with JobSet 0.6 or later, and has a node pool of this kind of TPU and topology for every slice:
# multi-host slices and reservations belong to node pools, and --reservation is an option of theirs.
#
# An evicted pod saves, and the run continues from there; MAX_RESTARTS bounds all restarts, whatever their reason.
# A mistake (exit code 2) ends the run at once.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
# shellcheck source=launch/job.sh
. launch/job.sh

# Sets accelerator, and how many VMs a slice has (hosts) with how many chips each (chips_per_host).
read_topology() {
  local a b c most=0
  case $generation in
  v4) accelerator=tpu-v4-podslice most=4096 ;;
  v5p) accelerator=tpu-v5p-slice most=6144 ;;
  tpu7x) accelerator=tpu7x most=9216 ;;
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v6e) accelerator=tpu-v6e-slice ;;
  esac
  chips_per_host=4
  case $generation:$topology in
  v5e:1x1 | v5e:2x2 | v5e:2x4 | v6e:1x1 | v6e:2x2 | v6e:2x4 | tpu7x:1x1x1) chips_per_host=$chips ;; # on one VM
  v5e:4x4 | v5e:4x8 | v5e:8x8 | v5e:8x16 | v5e:16x16) ;;
  v6e:4x4 | v6e:4x8 | v6e:8x8 | v6e:8x16 | v6e:16x16) ;;
  v5e:* | v6e:*) mistake "$job_file: TPU is '$TPU'; $generation comes as 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16 or 16x16" ;;
  *:2x2x1 | *:2x2x2 | *:2x2x4 | *:2x4x4) ;;
  *)
    IFS=x read -r a b c <<<"$topology"
    if [ -z "$c" ] || [ $((a % 4 + b % 4 + c % 4)) != 0 ] || [ "$a" -gt "$b" ] || [ "$b" -gt "$c" ] ||
      [ "$chips" -gt "$most" ]; then
      mistake "$job_file: TPU is '$TPU'; $generation comes as 2x2x1, 2x2x2, 2x2x4, 2x4x4, or multiples of 4 that do" \
        "not decrease (4x4x8), $most chips at most"
    fi
    ;;
  esac
  hosts=$((chips / chips_per_host))
}

# What is inside quotes in the manifest, and not looked at by job.sh.
check_names() {
  expect BUCKET '^[a-z0-9][a-z0-9._/-]*$' "the name of a bucket"
  expect IMAGE '^[a-z0-9][A-Za-z0-9._:/@-]*$' "the name of an image"
  expect NAMESPACE '^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$' "a namespace of Kubernetes"
  if [ -n "$SERVICE_ACCOUNT" ]; then
    expect SERVICE_ACCOUNT '^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$' "a service account of Kubernetes, in NAMESPACE"
  fi
}
expect() {
  if ! [[ ${!1} =~ $2 ]]; then mistake "$job_file: $1 is '${!1}'; on GKE it takes $3"; fi
}

print_manifest() {
  cat <<EOF
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: "$RUN"
  namespace: "$NAMESPACE"
EOF
  # All hosts of a slice on one node pool, which they do not share: only there do their chips reach each other.
  if [ "$hosts" -gt 1 ]; then
    cat <<EOF
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
EOF
  fi
  cat <<EOF
spec:
  failurePolicy:
    maxRestarts: $MAX_RESTARTS
    rules:
    - name: mistake
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: $SLICES
    template:
      spec:
        completionMode: Indexed
        parallelism: $hosts
        completions: $hosts
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: train
              operator: In
              values: [2]
        template:
          spec:
            restartPolicy: Never
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet
            # For a save. On spot nodes GKE gives 30 seconds at most.
            terminationGracePeriodSeconds: 300
EOF
  if [ -n "$SERVICE_ACCOUNT" ]; then
    cat <<EOF
            serviceAccountName: "$SERVICE_ACCOUNT"
EOF
  fi
  cat <<EOF
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $topology
EOF
  if [ "$PROVISIONING" = spot ]; then
    cat <<EOF
              cloud.google.com/gke-spot: "true"
EOF
  fi
  cat <<EOF
            tolerations:
            - key: google.com/tpu
              operator: Exists
              effect: NoSchedule
EOF
  if [ "$PROVISIONING" = spot ]; then
    cat <<EOF
            - key: cloud.google.com/gke-spot
              operator: Equal
              value: "true"
              effect: NoSchedule
EOF
  fi
  cat <<EOF
            containers:
            - name: train
              image: "$IMAGE"
              workingDir: /flax_mlm
              command:
              - bash
              - -c
              - |
                # 1, not the 2 of a mistake: a bucket that does not answer is worth another try.
                gcloud storage cp --quiet $job_url/bundle.tgz bundle.tgz || exit 1
                tar -xzf bundle.tgz || exit 1
                exec bash launch/worker.sh "slice\${MEGASCALE_SLICE_ID:-0}-worker\${TPU_WORKER_ID:-0}"
              env:
              - name: WORKER_RESTARTS
                value: "0"
              ports:
              - containerPort: 8471
              - containerPort: 8476
              - containerPort: 8477
              resources:
                limits:
                  google.com/tpu: $chips_per_host
              volumeMounts:
              - name: shm
                mountPath: /dev/shm
            volumes:
            - name: shm
              emptyDir:
                medium: Memory
EOF
}

read_arguments "$@"
if [ -z "$job_file" ] || [ ${#options[@]} != 0 ]; then
  mistake "${options[0]-no job file}: use bash launch/gke.sh JOB.env [--dry_run] -- ARGUMENTS OF TRAIN"
fi
case $job_file in /*) ;; *) job_file=$here/$job_file ;; esac
read_job "$job_file"
IMAGE=${IMAGE:-gcr.io/google.com/cloudsdktool/google-cloud-cli:slim}
check_names
read_topology
train_arguments
check_arguments >&2 # what it installs, it tells
upload_bundle
echo "$PROVISIONING $accelerator $topology: $SLICES slice(s) of $hosts pod(s) with $chips_per_host chip(s) each" >&2
echo "follow: kubectl logs -n $NAMESPACE -f -l jobset.sigs.k8s.io/jobset-name=$RUN --prefix" >&2
echo "end, or make way for another of this name: kubectl delete jobset -n $NAMESPACE $RUN" >&2
print_manifest
