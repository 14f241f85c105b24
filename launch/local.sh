#!/usr/bin/env bash
# The main job on this machine: a small encoder on the built-in corpus, five to seven minutes on two CPU cores.
#
#   bash launch/local.sh
#   bash launch/local.sh --config.train.steps=200 --workdir=runs/short
#   bash launch/local.sh --config=bert_base --workdir=runs/bert
#   bash launch/local.sh --processes=2 --devices_per_process=4     # a rehearsal of two hosts with four chips each
#
# Arguments go to `python -m flax_mlm.train`, but for these:
#   --processes=N            train in N processes (default 1), as N hosts would
#   --devices_per_process=M  each with M simulated CPU devices
#   --restarts=K             start again after at most K failures (default 3)
#   --dry_run                print what would be run, and run nothing
#
# A run that stopped for a preemption (exit code 75) is started again, as often as it takes. Ctrl-C or SIGTERM here
# ends it: the run saves, and the same line continues it.
set -euo pipefail

processes=1 devices='' restarts=3 arguments=() workdir='' dry_run=''
for argument in "$@"; do
  case $argument in
  --processes=* | --devices_per_process=* | --restarts=*)
    if ! [[ ${argument#*=} =~ ^(0|[1-9][0-9]{0,3})$ ]] || [[ $argument = *s=0 && $argument != --restarts* ]]; then
      echo "error: $argument; it takes a whole number, without zeros before it" >&2
      exit 2
    fi
    ;;
  esac
  case $argument in
  --processes=*) processes=${argument#*=} ;;
  --devices_per_process=*) devices=${argument#*=} ;;
  --restarts=*) restarts=${argument#*=} ;;
  --dry_run) dry_run=1 ;;
  *)
    case $argument in --workdir | --workdir=*) workdir=1 ;; esac
    arguments+=("$argument")
    ;;
  esac
done
if [ -z "$workdir" ]; then arguments+=(--workdir=runs/quickstart); fi
if [ -n "$dry_run" ]; then
  # shellcheck source=launch/job.sh
  . "$(dirname "$0")/job.sh"
  for ((i = 0; i < processes; i++)); do
    more=()
    if [ "$processes" -gt 1 ]; then more=(--coordinator=127.0.0.1:PORT "--num_processes=$processes" "--process_id=$i"); fi
    show ${devices:+env JAX_PLATFORMS=cpu "XLA_FLAGS=--xla_force_host_platform_device_count=$devices"} \
      python -m flax_mlm.train "${arguments[@]}" ${more[@]+"${more[@]}"}
  done
  exit
fi
# shellcheck source=launch/setup.sh
. "$(dirname "$0")/setup.sh" requirements.txt
# Memory in huge pages, where the system gives them to who asks: 3% of a step of 4 layers of 256 or of 512. glibc takes
# such a setting only before a program starts; those that can be made later are in flax_mlm/distributed/environment.py.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}glibc.malloc.hugetlb=1"
if [ -n "$devices" ]; then
  export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS-} --xla_force_host_platform_device_count=$devices"
fi

pids=() stopping='' interrupted=''
# A terminal that goes sends HUP to the run, too, which takes it and the TERM for one.
trap 'stopping=1 interrupted=1; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM HUP
trap 'stopping=1 interrupted=1' INT # a terminal sends it to the processes too, and a second one would cut their saving short

while :; do
  pids=()
  if [ "$processes" = 1 ]; then
    python -m flax_mlm.train "${arguments[@]}" &
    pids+=($!)
  else
    port=$(python -c 'from flax_mlm.distributed.rendezvous import free_port; print(free_port())')
    for ((i = 0; i < processes; i++)); do
      python -m flax_mlm.train "${arguments[@]}" \
        --coordinator="127.0.0.1:$port" --num_processes="$processes" --process_id="$i" &
      pids+=($!)
    done
  fi
  if [ -n "$stopping" ]; then kill -TERM "${pids[@]}" 2>/dev/null || true; fi # it came between

  code=0
  for pid in "${pids[@]}"; do
    while :; do
      status=0 interrupted=''
      wait "$pid" || status=$?
      if [ -z "$interrupted" ]; then break; fi # else a signal to us ended the wait, also where the run has ended since
    done
    # A mistake says more than a failure, and a failure more than a preemption.
    if [ "$status" = 2 ] || [ "$code" = 0 ] || { [ "$code" = 75 ] && [ "$status" != 0 ]; }; then code=$status; fi
  done

  if [ "$code" = 0 ] || [ "$code" = 2 ] || [ -n "$stopping" ]; then exit "$code"; fi
  if [ "$code" != 75 ]; then
    if [ "$restarts" = 0 ]; then exit "$code"; fi
    restarts=$((restarts - 1))
  fi
  echo "the run ended with exit code $code: restarting it" >&2 || true # a log on a full disk
done
