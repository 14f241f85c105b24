#!/usr/bin/env bash
# Our train step against torch's on one NVIDIA GPU, in under ten minutes; options are those of benchmarks/gpu.py.
#
#   bash benchmarks/gpu.sh --json=gpu.json > gpu.md
#   bash benchmarks/gpu.sh --smoke                # toy sizes, on any machine
#
# Needs a python3 (or PYTHON) with jax for CUDA, flax, optax, torch and transformers, no TensorFlow and no network. What
# it lacks of ours (ml_collections, say) it takes from wheels in .whl/:
#
#   pip download --no-deps --only-binary=:all: -d .whl ml_collections
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if compgen -G '.whl/*.whl' >/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --target "$site" .whl/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" -m benchmarks.gpu "$@"
