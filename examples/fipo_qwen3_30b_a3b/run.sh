#!/usr/bin/env bash
# FIPO on Qwen3-30B-A3B. Fetches the data where they are missing, checks the configuration and trains.
# A Ray cluster has to span its 4 nodes: cluster.ray_address=HOST:PORT is its head (docs/cluster.md).
# Arguments are settings that replace the file's, e.g. seed=1. PYTHON names another interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-.venv/bin/python}"
command -v "$python" >/dev/null || { echo "run.sh: PYTHON = $python: no such interpreter; run make install" >&2; exit 1; }
config=examples/fipo_qwen3_30b_a3b/config.yaml

if [[ ! -f data/dapo_math_17k.parquet || ! -f data/aime_2024.parquet || ! -f data/aime_2025.parquet ]]; then
    "$python" tools/prepare_data.py dapo_math_17k aime_2024 aime_2025
fi
"$python" tools/train.py "$config" "$@" --dry-run
exec "$python" tools/train.py "$config" "$@"
