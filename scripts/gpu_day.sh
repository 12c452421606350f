#!/usr/bin/env bash
# Everything that needs a GPU, in order of worth, within eight minutes: docs/benchmarks.md, "A machine with a GPU".
#   scripts/gpu_day.sh [--help]                  measure; --cpu runs every part shrunk
#   scripts/gpu_day.sh pack [--python 3.12]      what the machine may lack, into build/gpu_day, to be carried along
#   scripts/gpu_day.sh check FOLDER              put the rows of a folder into benchmarks/results
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  if [ -x "$root/.venv/bin/python" ]; then PYTHON=$root/.venv/bin/python; fi
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
case "${1:-}" in
  pack) shift; exec "$PYTHON" -m benchmarks.gpu_machine "$@" ;;
  check) shift; exec "$PYTHON" -m benchmarks.gpu_day --check "$@" ;;
  *) exec "$PYTHON" -m benchmarks.gpu_day "$@" ;;
esac
