# shellcheck shell=bash
# Sourced by other scripts: commands that are printed or run, what a job file may say, and the bundle of code that the
# workers get. For bash 3.2 and later, which is what a Mac has.

_KEYS='RUN PROJECT ZONE TPU SLICES BUCKET PROVISIONING RUNTIME_VERSION SERVICE_ACCOUNT NETWORK SUBNETWORK SECRETS
  MAX_RESTARTS MAX_WAIT_HOURS PRICE MAX_COST IMAGE NAMESPACE'
dry_run=''

# A mistake of the user's, or a failure: one line, and out.
mistake() {
  echo error: "$@" >&2
  exit 2
}
failure() {
  echo stopped: "$@" >&2
  exit 1
}

# Prints a command as it could be typed, and runs it unless this is a dry run.
run() {
  echo "+ $(show "$@")" >&2
  if [ -z "$dry_run" ]; then "$@"; fi
}

# What gcloud answers goes into `said`, where it fails what it complains of.
ask_quietly() {
  local complaints code=0
  complaints=$(mktemp)
  said=$("$@" 2>"$complaints") || code=$?
  if [ "$code" != 0 ]; then said=$(cat "$complaints"); fi
  rm -f "$complaints"
  return "$code"
}

# The same for what a person may want to see.
ask() {
  echo "+ $(show "$@")" >&2
  said=''
  if [ -z "$dry_run" ]; then ask_quietly "$@"; fi
}

# The line of a complaint that says most.
reason() {
  printf '%s\n' "$said" | grep -m 1 ERROR: || printf '%s\n' "$said" | tail -n 1
}

# A command line, quoted so that a shell reads it back as it is.
show() {
  local word line=''
  for word in "$@"; do
    case $word in *[!A-Za-z0-9_./:=,@%+-]* | '') word=\'${word//\'/\'\\\'\'}\' ;; esac
    line="$line $word"
  done
  printf '%s\n' "${line# }"
}

# Sets RUN, PROJECT and so on from a file of lines KEY=VALUE. Values are text: nothing in them is run or expanded.
read_job() {
  local file=$1 line key value number=0 name='^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$'
  if [ ! -f "$file" ]; then mistake "no job file '$file'; copy launch/tpu.env.example and fill it in"; fi
  for key in $_KEYS; do printf -v "$key" %s ''; done
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=${line%$'\r'}
    line=${line#"${line%%[![:space:]]*}"}
    case $line in '' | \#*) continue ;; esac
    key=${line%%=*} value=${line#*=}
    case " ${_KEYS//$'\n'/ } " in
    *" $key "*) ;;
    *) mistake "$file, line $number: '$key' is not a setting; these are: ${_KEYS//$'\n' /}" ;;
    esac
    if [ "$key" = "$line" ]; then mistake "$file, line $number: '$line'; a line is KEY=VALUE"; fi
    value=${value%%[[:space:]]#*}
    value=${value%"${value##*[![:space:]]}"}
    case $value in
    \"*\") value=${value#\"} value=${value%\"} ;;
    \'*\') value=${value#\'} value=${value%\'} ;;
    esac
    printf -v "$key" %s "$value"
  done <"$file"
  SLICES=${SLICES:-1} PROVISIONING=${PROVISIONING:-spot} MAX_RESTARTS=${MAX_RESTARTS:-20}
  MAX_WAIT_HOURS=${MAX_WAIT_HOURS:-24} NAMESPACE=${NAMESPACE:-default}
  BUCKET=${BUCKET#gs://}
  BUCKET=${BUCKET%/}
  if ! [[ $RUN =~ $name ]]; then
    mistake "$file: RUN is '$RUN'; it takes lower-case letters, digits and hyphens, a letter first, 40 at most"
  fi
  for key in PROJECT TPU BUCKET; do
    if [ -z "${!key}" ]; then mistake "$file: $key is missing"; fi
  done
  for key in SLICES MAX_RESTARTS MAX_WAIT_HOURS; do
    if ! [[ ${!key} =~ ^(0|[1-9][0-9]{0,3})$ ]]; then mistake "$file: $key is '${!key}'; it takes a whole number"; fi
  done
  if [ "$SLICES" = 0 ]; then mistake "$file: SLICES is 0; it takes 1 or more"; fi
  for key in PRICE MAX_COST; do
    if ! [[ ${!key:-0} =~ ^[0-9]+(\.[0-9]+)?$ ]]; then mistake "$file: $key is '${!key}'; it takes a number"; fi
  done
  if [ -n "$MAX_COST" ] && [ -z "$PRICE" ]; then mistake "$file: MAX_COST needs PRICE, of a chip for an hour"; fi
  case $PROVISIONING in
  spot | reserved | on_demand) ;;
  *) mistake "$file: PROVISIONING is '$PROVISIONING'; it takes spot, reserved or on_demand" ;;
  esac
  for value in $SECRETS; do
    if ! [[ $value =~ ^[A-Za-z_][A-Za-z0-9_]*=[A-Za-z0-9_-]+$ ]]; then
      mistake "$file: SECRETS has '$value'; it takes VARIABLE=NAME of secrets in Secret Manager, not the secrets"
    fi
  done
  if ! [[ $TPU =~ ^(v4|v5e|v5p|v6e|tpu7x):([1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2})$ ]]; then
    mistake "$file: TPU is '$TPU'; it takes what \`plan --topology\` does: v4, v5e, v5p, v6e or tpu7x, and a shape (v5e:4x4)"
  fi
  # shellcheck disable=SC2034  # for those who source this
  generation=${BASH_REMATCH[1]} topology=${BASH_REMATCH[2]}
  # shellcheck disable=SC2034
  chips=$((${topology//x/*}))
  job_url="gs://$BUCKET/flax_mlm/$RUN" # bundle, logs and what the workers say
}

# Splits `VERB JOB.env [--dry_run] [--option=value ...] [-- TRAIN ARGS]` into job_file, options and arguments.
read_arguments() {
  job_file='' options=() arguments=()
  while [ $# -gt 0 ]; do
    case $1 in
    --)
      shift
      arguments=("$@")
      break
      ;;
    --dry_run) dry_run=1 ;;
    --*) options+=("$1") ;;
    *)
      if [ -n "$job_file" ]; then mistake "unexpected argument '$1'; what is for train comes after --"; fi
      job_file=$1
      ;;
    esac
    shift
  done
}

# What `train` gets: the user's arguments, and a workdir in the bucket where they name none.
train_arguments() {
  local argument config='' workdir=''
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    case $argument in
    --workdir=*) workdir=${argument#*=} ;;
    --config=*) config=${argument#*=} ;;
    --workdir | --config) mistake "$argument has no value; write $argument=VALUE" ;;
    esac
  done
  config=${config%%:*}
  if [[ $config = *[./]* ]] && { [ ! -f "$config" ] || [[ $config = *..* || $config != configs/* ]]; }; then
    mistake "--config=$config: the workers get the folder configs/ of this repository; name a file in there"
  fi
  if [ -z "$workdir" ]; then
    arguments+=("--workdir=gs://$BUCKET/runs/$RUN")
  elif [[ $workdir != gs://* ]]; then
    mistake "--workdir is '$workdir'; all workers write there, so it is in a bucket: gs://$BUCKET/runs/$RUN"
  fi
}

# Refuses what `train` would refuse on the machines, before anything is billed.
check_arguments() {
  local said
  if [ ! -x "${VENV:-.venv}/bin/python" ]; then
    # shellcheck source=launch/setup.sh
    . launch/setup.sh requirements.txt
  fi
  if ! said=$("${VENV:-.venv}/bin/python" -m flax_mlm.train "${arguments[@]}" --print_config 2>&1 >/dev/null); then
    mistake "${said#error: }"
  fi
}

# Packs the code, the job file and the arguments, and puts them into the bucket.
upload_bundle() {
  local folder
  folder=$(mktemp -d)
  # shellcheck disable=SC2064  # the folder's name, now
  trap "rm -rf '$folder'" EXIT
  mkdir "$folder/job"
  cp "$job_file" "$folder/job/env"
  printf '%s\0' "${arguments[@]}" >"$folder/job/arguments"
  COPYFILE_DISABLE=1 tar -czf "$folder/bundle.tgz" --exclude=__pycache__ flax_mlm configs launch requirements.txt \
    -C "$folder" job
  ask gcloud storage cp "$folder/bundle.tgz" "$job_url/bundle.tgz" --quiet ||
    failure "the code cannot be copied into the bucket: $(reason)"
}
