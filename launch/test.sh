#!/usr/bin/env bash
# The whole test suite, in the same set-up as launch/local.sh. Arguments go to pytest.
#
#   bash launch/test.sh
#   bash launch/test.sh tests/test_masking.py -k whole_word
#   bash launch/test.sh --faults     # every fault of tests/faults, under 20 minutes on two cores
set -euo pipefail
. "$(dirname "$0")/setup.sh" requirements.txt tests/requirements.txt
case " $* " in
" --faults "*) exec python -m pytest tests/faults "$@" ;;
*) exec python -m pytest "$@" ;;
esac
