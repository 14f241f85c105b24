#!/usr/bin/env bash
# Virtual environments of the peers that we are measured against, one each: some GB, once.
#
#   bash benchmarks/setup.sh
#
# They go to .venv-bench/, or to the folder BENCH_VENVS. Run again, it does nothing.
set -euo pipefail
for requirements in benchmarks/{torch,flax,datatrove}-requirements.txt launch/{beam,ray}-requirements.txt; do
  (
    peer=$(basename "$requirements" -requirements.txt)
    export VENV=${BENCH_VENVS:-.venv-bench}/$peer
    # shellcheck source=launch/setup.sh
    . "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh" "$requirements"
  )
done
