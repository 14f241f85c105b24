#!/usr/bin/env bash
# All measurements of speed on this machine, which should have nothing else to do, then the generated section of
# docs/results/speed-cpu.md.
#
#   bash benchmarks/run.sh --config.data.source='text:wiki.txt.gz'
#
# Arguments, such as the text (default: the built-in corpus), go to each. What was measured lies in runs/benchmarks/, or
# the folder OUT; the sizes of the train step that are there are not measured again, all else is.
set -euo pipefail
# shellcheck source=launch/setup.sh
. "$(dirname "$0")/../launch/setup.sh" requirements.txt
bash benchmarks/setup.sh

out=${OUT:-runs/benchmarks}
mkdir -p "$out"
code=0
measure() { # NAME ARGUMENTS...: the others go on where one fails
  local name=$1
  shift
  echo "benchmarks.$name" >&2
  if python -m "benchmarks.$name" --json="$out/$name.json" "$@" >"$out/$name.new"; then
    mv "$out/$name.new" "$out/$name.md"
  else
    code=1
  fi
}
measure startup "$@"
measure masking --config.tokenizer.vocab_size=8192 "$@"
measure input --config.data.seq_len=512 --config.tokenizer.vocab_size=8192 "$@"
measure engines --config.data.seq_len=512 --config.tokenizer.vocab_size=8192 "$@"
measure packing --config=small --config.data.seq_len=512 --config.train.global_batch_size=8 "$@"
measure train_step "$@"
python -m benchmarks.results "$out"
exit "$code"
