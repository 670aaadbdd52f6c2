#!/usr/bin/env bash
# The quickstart. Checks the configuration and trains. It needs two CPU cores.
# Arguments are settings that replace the file's, e.g. seed=1. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-.venv/bin/python}"
command -v "$python" >/dev/null || { echo "run.sh: PYTHON = $python: no such interpreter; run make install" >&2; exit 1; }
config=examples/quickstart_cpu/config.yaml

"$python" tools/train.py "$config" "$@" --dry-run
exec "$python" tools/train.py "$config" "$@"
