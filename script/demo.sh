#!/usr/bin/env bash
# All the set-up, then the main job on the embedded model and the embedded samsum rows: full cache, uniform budgets,
# SqueezeAttention and calibrated budgets, for three eviction methods, each with its score and its distance from the full
# cache, as one table and one sentence. Within 10 minutes on 2 CPU cores, the set-up aside.
# The sizes and the number of rows (28 at most) can be given:
#     sample_num=28 ini_size=0.4 KV_class3=0.24 bash script/demo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
bash script/setup.sh

# Settings that are given take the place of the file's. What an earlier demo finished is not computed again.
changes=()
[ -z "${sample_num:-}" ] || changes+=("sample_num=$sample_num")
[ -z "${ini_size:-}" ] || changes+=("ini_size=$ini_size")
[ -z "${KV_class3:-}" ] || changes+=("KV_class3=$KV_class3")
said=$(.venv/bin/python -m squeeze.sweep config/demo.yaml "${changes[@]}" | tee >(cat >&2))

# The runs are those that the sweep named, full cache first.
mapfile -t folders < <(sed -n 's|^\(pred_Long/.*\)/samsum\.jsonl: .*|\1|p' <<<"$said")
.venv/bin/python -c 'import sys, eval; [eval.main([one]) for one in sys.argv[1:] if not one.endswith("/fidelity")]' \
    "${folders[@]}" >/dev/null
echo
.venv/bin/python -m squeeze.report "${folders[@]}"
