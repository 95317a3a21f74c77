#!/usr/bin/env bash
# What a machine with one GPU must show, measured in under ten minutes: every stage × tuning mode in bfloat16 and in four
# bits, tokens/s, MFU and memory beside TRL's, packing by attention implementation. One JSON, one table. Without a GPU it
# runs to its end all the same, in tiny shapes. Options are those of `python -m benchmarks.gpu`.
#
# PYTHON names an interpreter whose environment has what fedloom needs; without it .venv is taken, and made where it is
# not there (minutes, for PyTorch with CUDA; they do not count). OUT names the folder of gpu.json (runs/bench).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
if [ -z "${PYTHON:-}" ] && ! "$python" -c 'import trl, bitsandbytes' 2>/dev/null; then
  echo "installing fedloom into .venv (a few minutes)"
  python3 -m venv .venv
  extra=''
  if command -v nvidia-smi >/dev/null; then extra='[benchmarks]'; fi
  "$python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".$extra"
fi
exec "$python" -m benchmarks.gpu "$@"
