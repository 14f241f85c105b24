#!/usr/bin/env bash
# Masked against causal: the same text, order, shape and number of steps, four objectives (configs/objectives.py), then
# one table and a plot. About two hours on two CPU cores; a second call continues an interrupted one.
#
#   bash launch/compare_objectives.sh
#   bash launch/compare_objectives.sh --config.data.source='text:my/*.txt.gz' --workdir=runs/wiki \
#       --tasks='mlm; cloze; blimp=minimal_pairs --data=blimp/; cola=classification --train=cola.tsv --metric=matthews'
#   bash launch/compare_objectives.sh --config.train.steps=20000 --config.model.num_layers=12   # on a larger machine
#
# Arguments go to `python -m flax_mlm.train`, but for these:
#   --workdir=DIR    where corpus, runs and results go (default runs/objectives)
#   --tasks=...      of `python -m flax_mlm.compare` (default: mlm; cloze)
#   --dry_run        print what would be run, and run nothing
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/job.sh

workdir=runs/objectives tasks='mlm; cloze' arguments=() checkpoints=''
for argument in "$@"; do
  case $argument in
  --workdir=*) workdir=${argument#*=} ;;
  --tasks=*) tasks=${argument#*=} ;;
  --dry_run) dry_run=1 ;;
  *) arguments+=("$argument") ;;
  esac
done

if [ -z "$dry_run" ]; then
  # shellcheck source=launch/setup.sh
  . launch/setup.sh requirements.txt
fi
config=configs/objectives.py
if [ ! -e "$workdir/corpus/corpus.json" ]; then
  run python -m flax_mlm.prepare --config="$config" ${arguments[@]+"${arguments[@]}"} --output="$workdir/corpus"
fi
for objective in mlm_15 mlm_30 clm clm_mlm; do
  run bash launch/local.sh --config="$config:$objective" ${arguments[@]+"${arguments[@]}"} \
    --config.data.corpus="$workdir/corpus" --workdir="$workdir/$objective"
  checkpoints+=${checkpoints:+,}$workdir/$objective
done
run python -m flax_mlm.compare --checkpoints="$checkpoints" --tasks="$tasks" --output="$workdir/compared"
