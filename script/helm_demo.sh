#!/usr/bin/env bash
# All the set-up, then HELM's XSum offline: the embedded model on the embedded articles with a full, a uniform and a
# squeezed cache, scored by helm-run and shown by helm-summarize, as one table. The set-up aside, no network is used.
#     sample_num=43 ini_size=0.5 KV_class3=0.3 bash script/helm_demo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
bash script/setup.sh helm
export HF_HUB_OFFLINE=1

model=SmolLM2-135M
ini_size=${ini_size:-0.4}
KV_class3=${KV_class3:-0.25}
sample_num=${sample_num:-8}
requests=helm/demo_$sample_num.jsonl
folders=()

.venv/bin/python -m squeeze.helm_requests --scenario xsum_local --articles data/xsum/articles.jsonl --model "$model" \
    --sample_num "$sample_num" --temperature 0 --out "$requests"

# The seed, which greedy decoding does not need, keeps demos of different size apart from each other and from your runs.
run() {
    echo "== ${*:-full cache}"
    result=$(.venv/bin/python pred.py --model "$model" --pred xsum --requests "$requests" --device cpu \
        --seed "$sample_num" "$@")
    echo "$result"
    folders+=("$(echo "$result" | sed -n 's#/xsum.jsonl: .*##p')")
}
run
run --enable_squeeze --ini_size "$ini_size" --KV_class3 "$ini_size"
run --enable_squeeze --ini_size "$ini_size" --KV_class3 "$KV_class3"
PYTHON=.venv/bin/python sh script/helm.sh "${folders[@]}"
