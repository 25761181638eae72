#!/bin/sh
model=${model:-llama2-7b-32k}
ini_size=${ini_size:-0.4}
KV_class3=${KV_class3:-0.25}
# Score pred.py's predictions of HELM's XSum with HELM itself, and show ROUGE and KV kept of all runs scored so far.
# The settings above, or the same names in the environment, or flags say which run; all finished runs of its model on
# the same requests are scored with it. Or give run folders, and only those are scored:
#     ini_size=0.4 KV_class3=0.4 sh script/helm.sh
#     sh script/helm.sh --ini_size 0.4 --KV_class3 0.4 --algorithm h2o
#     sh script/helm.sh pred_xsum/llama2-7b-32k/full pred_xsum/llama2-7b-32k/0.4/25
# PYTHON names the interpreter; by default the active virtual environment's, or that of script/setup.sh.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -n "${PYTHON:-}${VIRTUAL_ENV:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
for argument in "$@"; do
    case $argument in
    pred_*) exec "$python" -m squeeze.helm_score "$@" ;;
    esac
done
exec "$python" -m squeeze.helm_score --model "$model" --ini_size "$ini_size" --KV_class3 "$KV_class3" "$@"
