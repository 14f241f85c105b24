#!/usr/bin/env bash
# What every machine of a TPU runs: installs Python and packages, trains, and tells the bucket how it goes. It lies in
# the bundle of code, and is started by the start-up script of tpu.sh, or by a pod of gke.sh:
#
#   bash launch/worker.sh NAME
#
# Under gs://BUCKET/flax_mlm/RUN it keeps logs/NAME.log, copied every minute; workers/NAME, what it does, with the time;
# and at the end DONE, or FAILED with the exit code and the last line. When STOP appears there, training saves and ends.
# It leaves with the exit code of `train`. A second one changes nothing while the first is at work.
#
# WORKER_HOME (default /var/lib/flax_mlm) keeps the lock, the packages and the log; WORKER_RESTARTS (3) is how often
# training starts again after failures; WORKER_EVERY (60) seconds lie between two copies of the log, WORKER_PATIENCE (2 5 15 40)
# between tries to install.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/job.sh
read_job job/env
name=$1 home=${WORKER_HOME:-/var/lib/flax_mlm} restarts=${WORKER_RESTARTS:-3} every=${WORKER_EVERY:-60}
mkdir -p "$home"
exec 9>"$home/lock" # training inherits it: also one that has lost this script counts
if ! flock -n 9; then
  echo "a worker is already running here"
  exit 0
fi
find "$home" -maxdepth 1 -name 'code.*' ! -name "$(basename "$PWD")" -exec rm -rf {} + # of earlier starts
log="$home/worker.log"
# The log of an earlier machine in this role: this one appends to it.
[ -e "$log" ] || gcloud storage cp "$job_url/logs/$name.log" "$log" --quiet >/dev/null 2>&1 || true
touch "$log"
begin=$(wc -c <"$log")
exec > >(trap '' TERM && exec tee -a "$log" 9>&-) 2>&1
echo "worker $name of $RUN on $(hostname), $(date -u)"

# Puts a line into an object of the bucket: NAME LINE, and options.
tell() {
  local file
  file=$(mktemp)
  printf '%s\n' "$2" >"$file"
  gcloud storage cp --quiet "${@:3}" "$file" "$job_url/$1" >/dev/null 2>&1 || echo "$1 could not be written"
  rm -f "$file"
}

# Again and again with longer and longer pauses, for what depends on a network.
patiently() {
  local pause
  for pause in ${WORKER_PATIENCE:-2 5 15 40} 0; do
    if "$@"; then return 0; fi
    if [ "$pause" != 0 ]; then sleep "$pause"; fi
  done
  return 1
}

copy_log() {
  gcloud storage cp --quiet "$log" "$job_url/logs/$name.log" >/dev/null 2>&1 || echo "the log could not be copied"
}

is_stopped() {
  gcloud storage ls "$job_url/STOP" >/dev/null 2>&1
}

# The background of training: copies the log, says that this worker lives, and looks for STOP.
attend() {
  local is_told=''
  while sleep "$every" 9>&-; do
    copy_log
    tell "workers/$name" "$(date +%s) at work"
    if [ -z "$is_told" ] && is_stopped; then
      echo "STOP requested: training saves and exits"
      kill -TERM $$
      is_told=1
    fi
  done
}

# Ends this script with the exit code of training, or for a REASON of its own.
finish() {
  local code=$1
  kill "$attending" 2>/dev/null || true
  trap - EXIT
  if [ "$code" != 0 ] && [ "$code" != 75 ]; then
    sleep 1 # for tee
    # The first to fail says why; what the others say follows from it.
    tell FAILED "$code $name: ${2:-$(tail -c "+$((begin + 1))" "$log" | grep -E '^(error|stopped): ' | tail -n 1)}" --if-generation-match=0
  fi
  copy_log
  if [ "$code" = 0 ]; then tell DONE "$name"; fi
  tell "workers/$name" "$(date +%s) ended with exit code $code"
  exit "$code"
}

# A run that was killed may have left processes that hold the TPU, and libtpu's lock.
free_the_tpu() {
  local pid
  for pid in $(find /proc/[0-9]*/fd -maxdepth 1 \( -lname "${TPU_DEVICES:-/dev/accel*}" -o -lname '/dev/vfio/[0-9]*' \) \
    2>/dev/null | cut -d/ -f3 | sort -u); do
    echo "process $pid still holds the TPU: killing it"
    kill -KILL "$pid" 2>/dev/null || true
  done
  rm -f /tmp/libtpu_lockfile
}

# shellcheck disable=SC2329  # by patiently
install() {
  export UV_CACHE_DIR="$home/uv-cache" UV_PYTHON_INSTALL_DIR="$home/python" PATH="$home/bin:$PATH"
  if ! command -v uv >/dev/null; then
    curl -LsSf --retry 5 https://astral.sh/uv/install.sh | UV_INSTALL_DIR="$home/bin" UV_NO_MODIFY_PATH=1 sh || return 1
  fi
  # The images of TPU machines come with Python 3.10, which is too old.
  if [ ! -x "$home/venv/bin/python" ]; then uv venv --quiet --python 3.12 "$home/venv" || return 1; fi
  export VIRTUAL_ENV="$home/venv" PATH="$home/venv/bin:$PATH"
  # The versions with which the run began, so that a machine that comes later has the same.
  local versions="$home/versions.txt" begun=()
  if gcloud storage cp --quiet "$job_url/versions.txt" "$versions" >/dev/null 2>&1; then begun=(-c "$versions"); fi
  uv pip install --quiet -r requirements.txt -r "${WORKER_REQUIREMENTS:-launch/tpu-requirements.txt}" \
    ${begun[@]+"${begun[@]}"} || return 1
  if [ ${#begun[@]} = 0 ]; then
    uv pip freeze >"$versions" || return 1
    gcloud storage cp --quiet --if-generation-match=0 "$versions" "$job_url/versions.txt" >/dev/null 2>&1 || true
  fi
}

# By name: the secrets themselves are in no command line, no metadata and no bundle.
# shellcheck disable=SC2329
read_secrets() {
  local pair value
  for pair in $SECRETS; do
    value=$(gcloud secrets versions access latest "--secret=${pair#*=}" "--project=$PROJECT") || return 1
    export "${pair%%=*}=$value"
  done
}

stopping='' pid='' code=75
trap 'stopping=1 interrupted=1; if [ -n "$pid" ]; then kill -TERM "$pid" 2>/dev/null || true; fi' TERM INT
tell "workers/$name" "$(date +%s) starting"
attend 9>&- &
attending=$!
trap 'finish 1 "worker.sh broke off, see its log"' EXIT
patiently install || finish 1 "Python and its packages cannot be installed"
patiently read_secrets || finish 1 "the secrets cannot be read: $SECRETS"

arguments=()
while IFS= read -r -d '' argument; do arguments+=("$argument"); done <job/arguments
# Process 0 listens at this port and the next one, which the network must let through between the machines.
export JAX_COORDINATOR_PORT=8476
line=(python -m flax_mlm.train --initialization_timeout=1800 "${arguments[@]}")
export JAX_COMPILATION_CACHE_DIR="$home/compiled" TPU_STDERR_LOG_LEVEL=2 TPU_MIN_LOG_LEVEL=2
# A stalled transfer of a checkpoint is tried again, and not waited for.
export TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS=60 TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES=1024
ulimit -n 100000 2>/dev/null || true

while [ -z "$stopping" ]; do
  free_the_tpu
  "${line[@]}" &
  pid=$!
  if [ -n "$stopping" ]; then kill -TERM "$pid"; fi # it came between
  while :; do
    code=0 interrupted=''
    wait "$pid" || code=$?
    if [ -z "$interrupted" ]; then break; fi # else a signal to us ended the wait, also where the run has ended since
  done
  pid=''
  echo "training ended with exit code $code, $(date -u)"
  if [ "$code" = 0 ] || [ "$code" = 2 ] || is_stopped; then break; fi
  if [ "${WORKER_RESTARTS-}" = 0 ]; then break; fi # whoever started this will do so again
  if [ "$code" != 75 ]; then
    if [ "$restarts" = 0 ]; then break; fi
    restarts=$((restarts - 1))
    sleep "${WORKER_PAUSE:-10}"
  fi
done
finish "$code"
