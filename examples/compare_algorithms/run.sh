#!/usr/bin/env bash
# FIPO, DAPO and GRPO on two tasks over five seeds: 30 runs, about three minutes each on two idle CPU cores, then one
# figure and one table. A run that has ended is not repeated: start it again to go on. Results are in runs/compare/.
set -euo pipefail
cd "$(dirname "$0")/../.."

run() { # task, steps, algorithm, seed
    local name="$1-$3-seed$4"
    if [[ -f "runs/compare/$name/hf/config.json" ]]; then return; fi
    .venv/bin/python tools/train.py "configs/$1_cpu.yaml" "algorithm=$3" "seed=$4" "trainer.steps=$2" parallel.tensor=1 \
        run.root=runs/compare "run.name=$name" run.overwrite=true
}

for seed in 0 1 2 3 4; do
    for algorithm in fipo_32b dapo grpo; do
        run checked_sums 20 "$algorithm" "$seed"
        run quickstart 30 "$algorithm" "$seed"
    done
done
.venv/bin/python tools/compare_runs.py runs/compare/*-seed? --title 'FIPO, DAPO and GRPO' \
    --out runs/compare/compare.png --markdown | tee runs/compare/compare.md
