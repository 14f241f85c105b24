#!/usr/bin/env bash
# A run on Cloud TPUs (v4 to v6e; for tpu7x and GKE see gke.sh): from a laptop with gcloud, through queued resources.
#
#   cp launch/tpu.env.example job.env                                # then fill it in
#   bash launch/tpu.sh check job.env -- --config=bert_base --config.data.corpus=gs://my-bucket/corpora/wiki
#   bash launch/tpu.sh submit job.env -- --config=bert_base --config.data.corpus=gs://my-bucket/corpora/wiki
#   bash launch/tpu.sh babysit job.env
#
#   check     verify login, project, zone, quota, bucket and its region, config; create nothing
#   submit    check, upload code and arguments to the bucket, request TPUs; restart on them where they exist already
#   status    show the state of the TPUs and of each machine
#   logs      show the logs of the machines: [--worker=slice0-worker3] [--follow]
#   ssh       log in to a machine: [--worker=N, default 0, or all] [--node=N] [-- COMMAND]
#   stop      save and end training; the TPUs stay and continue to be billed
#   delete    delete the TPUs; only the bucket remains to be billed
#   babysit   watch until the run is done, and recreate TPUs that were preempted or have failed; then delete them, also
#             when MAX_RESTARTS, MAX_WAIT_HOURS or MAX_COST is reached. Where several babysitters run, one acts
#
# All take --dry_run, which prints the commands and runs none. POLL (30) is the number of seconds between two polls.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/job.sh

poll=${POLL:-30}
gone_after=${GONE_AFTER:-600}      # seconds that deleting may take
silent_after=${SILENT_AFTER:-1800} # seconds without a heartbeat of any machine, which sends one every minute
failures=3                         # of the run itself, not preemptions, that babysit tolerates

tpus() {
  local group=$1 verb=$2
  shift 2
  command=(gcloud compute tpus "$group" "$verb" ${1+"$@"} "--project=$PROJECT" "--zone=$ZONE")
}

# The state of the queued resource in `state`, NONE where there is none; fails when that cannot be known.
look() {
  tpus queued-resources describe "$RUN" '--format=value(state.state)'
  if [ -n "$dry_run" ]; then
    ask "${command[@]}"
    state=NONE
  elif ask_quietly "${command[@]}"; then
    state=$said
  elif [[ $said = *NOT_FOUND* || $said = *'not found'* ]]; then
    state=NONE
  else
    return 1
  fi
}

# What is in the bucket for this run: its names in `objects` (DONE, workers/slice0-worker0, ...), and in `heard` when a
# machine last said something.
list_objects() {
  if ask_quietly gcloud storage ls "$job_url/**" --long; then
    objects=$(printf '%s\n' "$said" | sed -n "s|^.* $job_url/||p")
    heard=$(printf '%s\n' "$said" | awk '$3 ~ "/workers/" { print $2 }' | sort | tail -n 1)
  elif [[ $said = *'matched no objects'* ]]; then
    objects='' heard=''
  else
    return 1
  fi
}

has() {
  printf '%s\n' "$objects" | grep -qx "$1"
}

# Where the machines are, as a region: us-west4-a -> us-west4.
region() {
  printf '%s\n' "${ZONE%-*}"
}

check() {
  local where kind
  if ! command -v gcloud >/dev/null; then
    mistake "gcloud is not there; see https://cloud.google.com/sdk/docs/install"
  fi
  ask gcloud auth list '--filter=status:ACTIVE' '--format=value(account)' || mistake "gcloud: $(reason)"
  # With that property, gcloud asks without a login.
  if [ -z "$dry_run$said$(printenv CLOUDSDK_AUTH_DISABLE_CREDENTIALS || true)" ]; then
    mistake "nobody is logged in; gcloud auth login"
  fi
  ask gcloud projects describe "$PROJECT" '--format=value(lifecycleState)' ||
    mistake "project $PROJECT cannot be used: $(reason)"
  ask gcloud services list --enabled "--project=$PROJECT" '--filter=config.name=tpu.googleapis.com' \
    '--format=value(config.name)' || mistake "the APIs of $PROJECT cannot be listed: $(reason)"
  if [ -z "$dry_run" ] && [[ $said != *tpu.googleapis.com* ]]; then
    mistake "project $PROJECT does not use Cloud TPUs yet; gcloud services enable tpu.googleapis.com --project=$PROJECT"
  fi
  tpus accelerator-types describe "$accelerator_type" '--format=value(type)'
  ask "${command[@]}" || mistake "zone $ZONE has no $accelerator_type ($TPU): $(reason)"
  tpus tpu-vm versions describe "$runtime" '--format=value(version)'
  ask "${command[@]}" || mistake "RUNTIME_VERSION: zone $ZONE has no $runtime: $(reason)"
  ask gcloud storage buckets describe "gs://${BUCKET%%/*}" '--format=value(location,location_type)' ||
    mistake "BUCKET: gs://${BUCKET%%/*} cannot be used: $(reason)"
  read -r where kind <<<"$(printf '%s\n' "$said" | tr 'A-Z\t' 'a-z ')"
  if [ -z "$dry_run" ] && ! holds_region "$where" "$kind"; then
    mistake "BUCKET: gs://${BUCKET%%/*} is in $where, and the TPUs in $(region): each step of a checkpoint or corpus" \
      "would be billed while they wait; use a bucket in $(region)"
  fi
  check_quota
  check_arguments
  if [ -n "$dry_run" ]; then
    echo "not checked, for nobody was asked: login, project, zone, quota, bucket; checked: the job file and the config" >&2
    return 0
  fi
  echo "checks passed: $accelerator_type, $runtime, $PROVISIONING, in $ZONE" >&2
  echo "python -m flax_mlm.plan --topology=$TPU --slices=$SLICES estimates whether the run fits and what it costs" >&2
}

# Whether a bucket's location has the machines' region in it.
holds_region() {
  case $2 in
  region) [ "$1" = "$(region)" ] ;;
  multi-region) [[ $ZONE = ${1/eu/europe}-* ]] ;;
  *) return 0 ;; # two regions, as the user wished
  esac
}

# What the project may use of these TPUs in this zone. Where that is not told, it is only said so: creating will tell.
check_quota() {
  local name limit wanted=$((chips * SLICES)) preemptible='' quota
  case $PROVISIONING in
  spot) preemptible=Preemptible ;;
  reserved) return 0 ;; # what is reserved may be used
  esac
  case $generation in # of v4 and v5p, cores are counted
  v4) name=TPUV4s${preemptible}Pod wanted=$((2 * wanted)) ;;
  v5e) name=TPUV5s${preemptible}Litepod ;;
  v5p) name=TPUV5P$preemptible wanted=$((2 * wanted)) ;;
  v6e) name=TPUV6E$preemptible ;;
  esac
  quota=dimensionsInfos
  if ! ask gcloud beta quotas info list --service=tpu.googleapis.com "--project=$PROJECT" "--flatten=${quota}[]" \
    "--filter=quotaId=${name}PerProjectPerZoneForTPUAPI AND ($quota.dimensions.zone=$ZONE OR $quota.applicableLocations:$ZONE)" \
    "--format=value($quota.details.value)"; then
    echo "quota not checked: $(reason)" >&2
    return 0
  fi
  limit=$(printf '%s\n' "$said" | grep -m 1 -x -e '-\{0,1\}[0-9]\{1,\}' || true)
  if [ -n "$limit" ] && [ "$limit" -ge 0 ] && [ "$limit" -lt "$wanted" ]; then
    mistake "project $PROJECT may use $limit $generation in $ZONE, $PROVISIONING, and $SLICES × $TPU take $wanted" \
      "(quota ${name}PerProjectPerZoneForTPUAPI); ask for more"
  fi
}

create() {
  local nodes=("--node-id=$RUN") kind=() more=()
  if [ "$SLICES" -gt 1 ]; then nodes=("--node-count=$SLICES" "--node-prefix=$RUN"); fi
  case $PROVISIONING in
  spot) kind=(--spot) ;;
  reserved) kind=(--reserved) ;;
  esac
  if [ -n "$SERVICE_ACCOUNT" ]; then more+=("--service-account=$SERVICE_ACCOUNT"); fi
  if [ -n "$NETWORK" ]; then more+=("--network=$NETWORK"); fi
  if [ -n "$SUBNETWORK" ]; then more+=("--subnetwork=$SUBNETWORK"); fi
  tpus queued-resources create "$RUN" "--accelerator-type=$accelerator_type" "--runtime-version=$runtime" "${nodes[@]}" \
    ${kind[@]+"${kind[@]}"} ${more[@]+"${more[@]}"} --scopes=cloud-platform "--labels=flax_mlm=$RUN" \
    "--metadata=flax-mlm-job=$job_url" --metadata-from-file=startup-script=launch/startup.sh \
    "--valid-until-duration=$((MAX_WAIT_HOURS + 1))h" --quiet # who babysits has given up before
  ask "${command[@]}"
}

# What an earlier start of this run has said, so that it is not taken for news.
forget() {
  ask gcloud storage rm "$@" --quiet || true
}

# A run that is submitted again has its failures and restarts before it, but what was spent is spent.
forgive() {
  local who since
  if [ -n "$dry_run" ] || ! read_babysitter || [ "$who" != nobody ]; then return 0; fi
  restarts=0 failed=0
  hold nobody || true
}

submit() {
  train_arguments
  check
  look || failure "the TPUs of $RUN cannot be looked for: $(reason)"
  case $state in
  NONE | ACTIVE) ;;
  *) mistake "$RUN exists already, and is $state; watch it (babysit), or delete it first" ;;
  esac
  upload_bundle
  forget "$job_url/STOP" "$job_url/DONE" "$job_url/FAILED" "$job_url/workers/**"
  forgive
  if [ "$state" = ACTIVE ]; then
    on_all_workers 'sudo google_metadata_script_runner startup' || failure "not started on all machines: $(reason)"
    echo "starting the run on the existing TPUs" >&2
  else
    create || failure "$RUN was not created, and costs nothing: $(reason)"
    if [ -n "$dry_run" ]; then return 0; fi
    echo "$SLICES × $TPU requested as $RUN. Next: bash launch/tpu.sh babysit $job_file" >&2
    echo "without a babysitter, delete them yourself once status shows DONE" >&2
  fi
}

# gcloud runs a command again when its connection breaks: it must not matter.
on_all_workers() {
  local node
  for ((node = 0; node < SLICES; node++)); do
    tpus tpu-vm ssh "$(node_name "$node")" --worker=all --quiet "--command=$1"
    ask "${command[@]}" || return 1
  done
}

node_name() {
  if [ "$SLICES" = 1 ]; then printf '%s\n' "$RUN"; else printf '%s\n' "$RUN-$1"; fi
}

status() {
  local name what since
  look || failure "the TPUs of $RUN cannot be looked for: $(reason)"
  if [ -n "$dry_run" ]; then return 0; fi
  echo "$RUN: $SLICES × $TPU, $state"
  list_objects || failure "gs://$BUCKET cannot be read: $(reason)"
  for name in $(printf '%s\n' "$objects" | grep '^workers/'); do
    read -r since what <<<"$(gcloud storage cat "$job_url/$name")"
    echo "${name#workers/}: $what, $(($(date +%s) - since)) s ago"
  done
  for name in STOP FAILED DONE; do
    if has "$name"; then echo "$name: $(gcloud storage cat "$job_url/$name")"; fi
  done
}

logs() {
  local worker=slice0-worker0 follow='' option seen=0 size
  for option in ${options[@]+"${options[@]}"}; do
    case $option in
    --worker=*) worker=${option#*=} ;;
    --follow) follow=1 ;;
    *) mistake "logs: no option '$option'; these are --worker=NAME and --follow" ;;
    esac
  done
  if [ -n "$dry_run" ]; then
    ask gcloud storage cat "$job_url/logs/$worker.log"
    return 0
  fi
  while :; do
    if ask_quietly gcloud storage cat "--range=$seen-" "$job_url/logs/$worker.log"; then
      printf '%s' "$said"
      size=$(printf '%s' "$said" | wc -c)
      seen=$((seen + size))
    elif [ "$seen" = 0 ] && [ -z "$follow" ]; then
      list_objects || failure "gs://$BUCKET cannot be read: $(reason)"
      mistake "no log of $worker yet; available: $(printf '%s\n' "$objects" | sed -n 's|^logs/\(.*\).log$|\1|p' | tr '\n' ' ')"
    fi
    if [ -z "$follow" ]; then break; fi
    if list_objects && { has DONE || has FAILED; }; then break; fi
    sleep "$poll"
  done
}

enter() {
  local worker=0 node=0 option
  for option in ${options[@]+"${options[@]}"}; do
    case $option in
    --worker=*) worker=${option#*=} ;;
    --node=*) node=${option#*=} ;;
    *) mistake "ssh: no option '$option'; these are --worker=N and --node=N" ;;
    esac
  done
  tpus tpu-vm ssh "$(node_name "$node")" "--worker=$worker"
  if [ ${#arguments[@]} -gt 0 ]; then command+=("--command=$(show "${arguments[@]}")"); fi
  run "${command[@]}"
}

# Tells the machines to save and end, and waits until all that have said something have ended.
stop() {
  local file end=$((SECONDS + ${STOP_WITHIN:-600})) name waiting
  file=$(mktemp)
  date >"$file"
  ask gcloud storage cp "$file" "$job_url/STOP" --quiet || failure "STOP cannot be written to the bucket: $(reason)"
  rm -f "$file"
  if [ -n "$dry_run" ]; then return 0; fi
  while [ "$SECONDS" -lt "$end" ]; do
    waiting=' (the bucket cannot be read)'
    list_objects || {
      sleep "$poll"
      continue
    }
    waiting=''
    for name in $(printf '%s\n' "$objects" | grep '^workers/'); do
      if ! [[ $(gcloud storage cat "$job_url/$name" 2>/dev/null) = *ended* ]]; then waiting="$waiting ${name#workers/}"; fi
    done
    if [ -z "$waiting" ]; then
      echo "all machines have saved and exited" >&2
      return 0
    fi
    sleep "$poll"
  done
  echo "still running:$waiting" >&2
  return 1
}

# Deletes the queued resource with its nodes, and waits until they are gone.
delete() {
  local end=$((SECONDS + gone_after)) left='' name
  tpus queued-resources delete "$RUN" --force --quiet --async
  local delete=("${command[@]}")
  if [ -n "$dry_run" ]; then
    ask "${delete[@]}"
    return 0
  fi
  ask "${delete[@]}" || true
  while [ "$SECONDS" -lt "$end" ]; do
    if look; then
      if [ "$state" = NONE ]; then break; fi
      sleep "$poll"
      if [ "$state" != DELETING ]; then ask_quietly "${delete[@]}" || true; fi # what was asked before has failed
    else
      sleep "$poll"
    fi
  done
  tpus tpu-vm list "--filter=labels.flax_mlm=$RUN" '--format=value(name.basename())'
  if [ "${state:-}" = NONE ] && ask_quietly "${command[@]}"; then
    for name in $said; do
      tpus tpu-vm delete "$name" --quiet
      if ! ask "${command[@]}"; then left="$left $name"; fi
    done
  else
    left=" $RUN (${state:-unknown})"
  fi
  if [ -n "$left" ]; then
    echo "stopped: not deleted, and billed until it is:$left; try again:" \
      "bash launch/tpu.sh delete $job_file ($(reason))" >&2
    return 1
  fi
  echo "$RUN is deleted; its files stay in the bucket: $job_url, gs://$BUCKET/runs/$RUN" >&2
}

# The babysitter's own object in the bucket says who it is, and what has been used over all restarts.

me="$(hostname)-$$-$(date +%s)"
restarts=0 failed=0 seconds=0 held=0

# Writes the object for ME, if it is what it was when we last wrote it; fails when another has written, or the bucket
# cannot be reached (`said` says which).
hold() {
  local file code=0
  file=$(mktemp)
  printf '%s\n' "$1 $restarts $failed $seconds $(date +%s)" >"$file"
  said=$(gcloud storage cp --quiet --print-created-message "--if-generation-match=$held" "$file" \
    "$job_url/babysitter" 2>&1) || code=1
  rm -f "$file"
  if [ "$code" = 0 ]; then held=$(printf '%s\n' "$said" | sed -n 's/.*babysitter#\([0-9]\{1,\}\).*/\1/p'); fi
  return "$code"
}

# Who was the last, and what was used until then: `who restarts failed seconds since`.
read_babysitter() {
  ask_quietly gcloud storage objects describe "$job_url/babysitter" '--format=value(generation)' || return 1
  held=$said
  ask_quietly gcloud storage cat "$job_url/babysitter" || return 1
  read -r who restarts failed seconds since <<<"$said"
}

begin_holding() {
  local who since
  if hold "$me"; then return 0; fi
  read_babysitter || failure "the bucket cannot be used: $(reason)"
  if [ "$who" != nobody ] && [ $(($(date +%s) - since)) -lt $((10 * poll + 60)) ]; then
    mistake "$RUN has a babysitter already: $who"
  fi
  hold "$me" || mistake "$RUN has a babysitter already, which came at the same time"
}

# Ends babysitting: CODE MESSAGE. Nothing that costs is left, or it is said.
leave() {
  local code=$1 deleted=0
  shift
  delete || deleted=1
  hold nobody || true
  if [ "$code" = 0 ]; then echo "$@" >&2; else echo stopped: "$@" >&2; fi
  if [ "$code" = 0 ]; then code=$deleted; fi
  exit "$code"
}

cost() {
  awk "BEGIN { printf \"%.2f\", $seconds / 3600 * $chips * $SLICES * ${PRICE:-0} }"
}

# Recreates the TPUs; WHY is the state of the last ones.
recreate() {
  if [ "$restarts" -ge "$MAX_RESTARTS" ]; then leave 1 "$RUN: $1, and was recreated $restarts times (MAX_RESTARTS)"; fi
  restarts=$((restarts + 1))
  echo "$1: recreating it (restart $restarts of $MAX_RESTARTS)" >&2
  delete || leave 1 "$RUN: $1, and cannot be deleted"
  forget "$job_url/FAILED" "$job_url/workers/**"
  if ! create; then
    case $said in
    *PERMISSION_DENIED* | *INVALID_ARGUMENT* | *[Qq]uota*) leave 1 "$RUN cannot be recreated: $(reason)" ;;
    *) echo "$RUN could not be recreated; trying again: $(reason)" >&2 ;;
    esac
  fi
  waiting_since=$SECONDS silent_since=$SECONDS
}

babysit() {
  local unreachable=0 last=$SECONDS before='' heard_before='' why
  waiting_since=$SECONDS silent_since=$SECONDS
  if [ -n "$dry_run" ]; then
    look
    ask gcloud storage ls "$job_url/**" --long
    delete
    create
    return 0
  fi
  list_objects || failure "gs://$BUCKET cannot be read: $(reason)"
  has bundle.tgz || mistake "$RUN was never submitted: bash launch/tpu.sh submit $job_file -- TRAIN ARGS"
  begin_holding
  trap 'hold nobody || true; echo "the TPUs run on without a babysitter and continue to be billed: bash launch/tpu.sh babysit $job_file" >&2; exit 130' INT TERM
  while :; do
    if ! look; then
      unreachable=$((unreachable + 1))
      echo "cannot see $RUN ($unreachable of 20): $(reason)" >&2
      if [ "$unreachable" -ge 20 ]; then
        failure "$RUN cannot be seen; it may exist and be billed: bash launch/tpu.sh delete $job_file"
      fi
      sleep "$poll"
      continue
    elif ! list_objects; then
      unreachable=$((unreachable + 1))
      echo "cannot read the bucket ($unreachable of 20): $(reason)" >&2
      # Who cannot read there may not know how to write there, and trains in vain.
      if [ "$unreachable" -ge 20 ]; then leave 1 "$RUN: gs://$BUCKET cannot be read: $(reason)"; fi
      sleep "$poll"
      continue
    fi
    unreachable=0
    case $state in ACTIVE | SUSPENDING | DELETING) seconds=$((seconds + SECONDS - last)) ;; esac
    last=$SECONDS
    if ! hold "$me" && [[ $said = *412* || $said = *[Pp]recondition* ]]; then
      failure "another babysitter has taken over $RUN"
    fi
    if [ "$state" != "$before" ]; then
      echo "$(date '+%F %T') $RUN is $state${PRICE:+, $(cost) spent}" >&2
      before=$state
    fi
    if has DONE; then leave 0 "$RUN is done${PRICE:+, for $(cost)}: gs://$BUCKET/runs/$RUN"; fi
    if [ "$state" = ACTIVE ] && has FAILED; then # else it was preempted, and the rest follows from that
      why=$(gcloud storage cat "$job_url/FAILED" 2>/dev/null || true)
      case $why in
      '2 '*) leave 2 "$RUN: a mistake; ${why#2 }" ;;
      ?*)
        failed=$((failed + 1))
        if [ "$failed" -ge "$failures" ]; then leave 1 "$RUN failed $failed times, the last time: ${why#* }"; fi
        recreate "$RUN failed: ${why#* }"
        continue
        ;;
      esac
    fi
    if has STOP; then
      hold nobody || true
      echo "$RUN was stopped as requested. Its TPUs continue to be billed: submit continues the run, delete removes them" >&2
      exit 0
    fi
    if [ -n "$MAX_COST" ] && awk "BEGIN { exit !($(cost) >= $MAX_COST) }"; then
      stop || true
      leave 1 "$RUN has cost $(cost) (MAX_COST is $MAX_COST); it is saved; submit continues it"
    fi
    if [ "$state" != ACTIVE ] || [ "$heard" != "$heard_before" ]; then silent_since=$SECONDS heard_before=$heard; fi
    case $state in
    SUSPENDED) recreate "$RUN was preempted" ;;
    FAILED | NONE) recreate "$RUN is ${state/NONE/gone}" ;;
    ACTIVE)
      waiting_since=$SECONDS
      if [ $((SECONDS - silent_since)) -gt "$silent_after" ]; then
        failed=$((failed + 1))
        why="none of its machines has said a word for $silent_after s (may its service account write to the bucket?)"
        if [ "$failed" -ge "$failures" ]; then leave 1 "$RUN: $why"; fi
        recreate "$RUN: $why"
      fi
      ;;
    *)
      if [ $((SECONDS - waiting_since)) -ge $((${HOUR:-3600} * MAX_WAIT_HOURS)) ]; then
        leave 1 "$RUN is still $state after $MAX_WAIT_HOURS hours (MAX_WAIT_HOURS); no TPUs came"
      fi
      ;;
    esac
    sleep "$poll"
  done
}

verb=${1-}
shift || true
case $verb in
check | submit | status | logs | ssh | stop | delete | babysit) ;;
*) mistake "tpu.sh takes check, submit, status, logs, ssh, stop, delete or babysit, then a job file; see the head of this file" ;;
esac
read_arguments "$@"
read_job "${job_file:-job.env}"
job_file=${job_file:-job.env}
if [ -z "$ZONE" ]; then mistake "$job_file: ZONE is missing"; fi
if [ ${#options[@]} -gt 0 ] && [ "$verb" != logs ] && [ "$verb" != ssh ]; then
  mistake "$verb: no option '${options[0]}'; what is for train comes after --"
fi
case $generation in # names, and how many of what Google counts
v4) accelerator_type=v4-$((2 * chips)) runtime=tpu-ubuntu2204-base ;;
v5e) accelerator_type=v5litepod-$chips runtime=v2-alpha-tpuv5-lite ;;
v5p) accelerator_type=v5p-$((2 * chips)) runtime=v2-alpha-tpuv5 ;;
v6e) accelerator_type=v6e-$chips runtime=v2-alpha-tpuv6e ;;
*) mistake "$job_file: TPU is $TPU, which the Cloud TPU API does not have; use launch/gke.sh" ;;
esac
runtime=${RUNTIME_VERSION:-$runtime}
case $verb in
check)
  train_arguments
  check
  ;;
ssh) enter ;;
*) "$verb" ;;
esac
