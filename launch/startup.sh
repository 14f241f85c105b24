#!/usr/bin/env bash
# Start-up script of the machines of a TPU, which run it as root whenever they start: fetches the code and starts
# launch/worker.sh as a service. Run again, say by ssh, it changes nothing while a worker is at work.
set -euo pipefail

attribute() {
  curl -sSf --retry 10 --retry-connrefused -H 'Metadata-Flavor: Google' \
    "http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/attributes/$1"
}

job_url=$(attribute flax-mlm-job)
slice=$(attribute tpu-env | sed -n "s/^MEGASCALE_SLICE_ID: *'\{0,1\}\([0-9]*\).*/\1/p")
name="slice${slice:-0}-worker$(attribute agent-worker-number)"
home=${WORKER_HOME:-/var/lib/flax_mlm}
mkdir -p "$home"
code=$(mktemp -d "$home/code.XXXXXX")
for pause in 5 10 20 40 80 0; do
  if gcloud storage cp --quiet "$job_url/bundle.tgz" "$code/bundle.tgz"; then break; fi
  if [ "$pause" = 0 ]; then
    echo "error: $job_url/bundle.tgz cannot be read; may this machine's service account read the bucket?" >&2
    exit 1
  fi
  sleep "$pause"
done
tar -xzf "$code/bundle.tgz" -C "$code"
# A service outlives ssh, and ends before the network does: a run that is preempted can still save. Its end is told to
# worker.sh alone, which tells training.
systemd-run --collect --property=After=network-online.target --property=KillMode=mixed --property=TimeoutStopSec=120 \
  --setenv=WORKER_HOME="$home" bash "$code/launch/worker.sh" "$name"
