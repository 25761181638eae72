#!/usr/bin/env bash
# All the set-up, then the main job on the embedded model and the embedded samsum rows: full cache, uniform budgets,
# SqueezeAttention and calibrated budgets, for three eviction methods, as one table. Within 15 minutes on 2 CPU cores,
# the set-up aside.
# The sizes and the number of rows (28 at most) can be given:
#     sample_num=28 ini_size=0.4 KV_class3=0.24 bash script/demo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
bash script/setup.sh

model=SmolLM2-135M
ini_size=${ini_size:-0.2}
KV_class3=${KV_class3:-0.12}
sample_num=${sample_num:-6}
folders=()

# Predictions and their score; the flags say which cache. What an earlier demo finished is not computed again.
run() {
    echo "== ${*:-full cache}"
    .venv/bin/python pred.py --model "$model" --pred Long "$@" \
        --data_dir data/longbench --datasets samsum --device cpu --sample_num "$sample_num"
    result=$(.venv/bin/python eval.py --model "$model" --pred Long "$@" | tail -n 1)
    folders+=("${result%/result.json}")
}

run
for algorithm in sliding_window streaming h2o; do
    squeeze=(--enable_squeeze --algorithm "$algorithm" --ini_size "$ini_size")
    run "${squeeze[@]}" --KV_class3 "$ini_size"
    for allocation in squeeze squeeze-log; do
        run "${squeeze[@]}" --KV_class3 "$KV_class3" --allocation "$allocation"
    done
    run "${squeeze[@]}" --allocation calibrated
done
echo
.venv/bin/python -m squeeze.report "${folders[@]}"
