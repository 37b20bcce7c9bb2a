#!/bin/sh
# Everything that wants a GPU, in one call of under eight minutes: gpu.json and gpu.md in the folder given (or $OUT).
set -e
cd "$(dirname "$0")/.."
exec timeout 470 "${PYTHON:-python}" -m benchmarks.gpu --out "${1:-${OUT:-output/gpu}}"
