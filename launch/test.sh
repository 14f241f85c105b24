#!/usr/bin/env bash
# The whole test suite, in the same set-up as launch/local.sh. Arguments go to pytest.
#
#   bash launch/test.sh
#   bash launch/test.sh tests/test_masking.py -k whole_word
set -euo pipefail
. "$(dirname "$0")/setup.sh" requirements.txt tests/requirements.txt
exec python -m pytest "$@"
