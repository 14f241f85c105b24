#!/usr/bin/env bash
# The main job on this machine: a small encoder on the built-in corpus, about five minutes on two CPU cores.
#
#   bash launch/local.sh
#   bash launch/local.sh --config.train.steps=200 --workdir=runs/short
#   bash launch/local.sh --config=configs/bert_base.py --workdir=runs/bert
#
# Arguments go to `python -m flax_mlm.train`. Killed or finished, the same line goes on from where it was.
set -euo pipefail
. "$(dirname "$0")/setup.sh" requirements.txt

case " $* " in
*" --workdir"*) exec python -m flax_mlm.train "$@" ;;
*) exec python -m flax_mlm.train --workdir=runs/quickstart "$@" ;;
esac
