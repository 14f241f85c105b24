#!/usr/bin/env bash
# The whole test suite, in the same set-up as launch/local.sh, by three or four processes. Arguments go to pytest, which
# then is one process.
#
#   bash launch/test.sh
#   bash launch/test.sh --quick      # an answer within three minutes: unit tests, one mesh, one run
#   bash launch/test.sh tests/unit/test_masking.py -k whole_word
#   bash launch/test.sh --full       # also what is too long for every commit; units with XLA's optimisations as well
#   bash launch/test.sh --faults     # every fault of tests/faults, under 20 minutes on two cores
#   bash launch/test.sh --references # what needs torch, transformers or the TPU compiler, which are installed for it
#   bash launch/test.sh --engines    # `prepare` on Beam and on Ray, each in an environment of its own
set -euo pipefail
# shellcheck source=launch/setup.sh
. "$(dirname "$0")/setup.sh" requirements.txt tests/requirements.txt
# A file's tests share what they train. Many wait more than they compute: three processes use two processors well.
# A test that ends its process, as one that hangs does, is tried once more.
shared=(--dist=loadfile --no-loadscope-reorder --max-worker-restart=1 -n $(($(nproc) < 4 ? 3 : 4)))
busy=("${shared[@]}" -n logical --maxprocesses=4) # for tests that keep every processor busy
case " $* " in
*" --references "*)
  . launch/setup.sh tests/reference-requirements.txt launch/tpu-requirements.txt
  exec python -m pytest "${busy[@]}" tests/parity/test_hf_reference.py tests/parity/test_tokenizer_reference.py \
    tests/parity/test_transformers_parity.py tests/parity/test_onnx_reference.py \
    tests/parity/test_task_heads_reference.py tests/parity/test_plan_tpu.py "$@"
  ;;
*" --engines "*)
  LOCAL_PYTHON=$(command -v python) # what the engines' corpora are compared with is made as by a user without them
  export LOCAL_PYTHON
  for engine in beam ray; do
    (
      VENV=${VENV:-.venv}-$engine
      . launch/setup.sh "launch/$engine-requirements.txt" tests/engines/requirements.txt
      # Of the other tests' settings nothing holds here: they need jax.
      python -m pytest --confcutdir=tests/engines tests/engines -k "$engine"
    )
  done
  ;;
" --full ")
  python -m pytest "${shared[@]}" "$@"
  # Compiled as in a real run: the tests compile without optimisations, which is faster.
  XLA_FLAGS=--xla_backend_optimization_level=3 exec python -m pytest "${shared[@]}" tests/unit tests/parity
  ;;
" --quick ") exec python -m pytest "${busy[@]}" "$@" ;;
"  ") exec python -m pytest "${shared[@]}" ;;
" --faults "*) exec python -m pytest tests/faults "$@" ;;
*) exec python -m pytest "$@" ;;
esac
