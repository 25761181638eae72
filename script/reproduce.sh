#!/usr/bin/env bash
# The paper's experiments on your models, ending in a page with figures and tables, report/index.html.
#     bash script/reproduce.sh --model Mistral                                  # all three experiments
#     bash script/reproduce.sh --model Mistral --model my/model --only longbench,speed device=cuda:0 sample_num=50
#     bash script/reproduce.sh --model Mistral --dry_run                        # what it costs, before it starts
#     bash script/reproduce.sh --demo               # the embedded model on the embedded rows: 12 minutes on 2 CPU cores
# Experiments: longbench (config/published.yaml and config/paper_longbench.yaml), xsum (config/paper_xsum.yaml; HELM
# builds the requests and scores them; articles=FILE in the environment takes your own instead of a download), and speed
# (python -m squeeze.bench). Models are named as for pred.py. KEY=VALUE goes to the sweeps, in place of what their files
# say. What is finished is not done again, and what was interrupted goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

stop() { echo "error: $1" >&2; exit 2; }
models=() changes=() only=longbench,xsum,speed demo= dry_run=
while [ $# -gt 0 ]; do
    case $1 in
    --model) models+=("${2:?--model needs a name}"); shift ;;
    --only) only=${2:?--only needs experiments}; shift ;;
    --demo) demo=1 ;;
    --dry_run) dry_run=--dry_run ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit ;;
    *=*) changes+=("$1") ;;
    *) stop "$1 is no option of this script: --model, --only, --demo, --dry_run or KEY=VALUE (--help explains them)" ;;
    esac
    shift
done
for experiment in ${only//,/ }; do
    case $experiment in longbench | xsum | speed) ;; *) stop "--only takes longbench, xsum and speed, not $experiment" ;; esac
done
[ -n "$demo" ] || [ ${#models[@]} -gt 0 ] || stop "--model is missing; --demo takes the embedded one"
[ -z "$demo" ] || [ ${#models[@]} -eq 0 ] || stop "--demo takes the embedded model: leave --model out"
wants() { [[ ,$only, == *,$1,* ]]; }

parts=core
[ -n "$demo" ] || ! wants xsum || parts=helm
bash script/setup.sh $parts
python=.venv/bin/python
results=()

sweep() { # FILE [KEY=VALUE ...]
    echo "== $*"
    $python -m squeeze.sweep "$@" "${changes[@]+"${changes[@]}"}" $dry_run
}
bench() { # the flags of squeeze.bench but --out, and that
    [ -z "$dry_run" ] || return 0
    local out=${*: -1}
    if [ ! -e "$out/bench.json" ]; then
        echo "== speed and memory, into $out"
        $python -m squeeze.bench "${@:1:$#-1}" --out "$out"
    fi
    results+=("$out/bench.json")
}

if [ -n "$demo" ]; then
    sweep config/sweep_demo.yaml
    results+=(pred_Long)
    bench --dtype float32 --batch_size 1 2 4 --prompt_length 1024 --new_tokens 33 --rounds 1 bench/demo
fi
for model in "${models[@]+"${models[@]}"}"; do
    name=${model##*/}
    if wants longbench; then
        sweep config/published.yaml "model=$model"
        sweep config/paper_longbench.yaml "model=$model"
        results+=(pred_Long)
    fi
    if wants xsum; then
        requests=helm/requests/xsum-$name.jsonl
        scenario=(--scenario xsum)
        [ -z "${articles:-}" ] || scenario=(--scenario xsum_local --articles "$articles")
        [ -e "$requests" ] || $python -m squeeze.helm_requests "${scenario[@]}" --model "$model" --out "$requests"
        sweep config/paper_xsum.yaml "model=$model" "requests=$requests"
        [ -n "$dry_run" ] ||
            PYTHON=$python sh script/helm.sh --model "$model" --algorithm h2o --ini_size 0.4 --KV_class3 0.25
        results+=(pred_xsum)
    fi
    if wants speed; then # the paper's shape of prompt and answer, at growing batch sizes
        device=cpu dtype=float32
        ! $python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || device=cuda:0 dtype=bfloat16
        for change in "${changes[@]+"${changes[@]}"}"; do
            case $change in device=* | dtype=*) declare "$change" ;; esac
        done
        bench --model "$model" --device "$device" --dtype "$dtype" --batch_size 1 8 32 64 128 --prompt_length 512 \
            --new_tokens 1024 --rounds 1 "bench/$name"
    fi
done
[ -n "$dry_run" ] || $python -m squeeze.report $(printf '%s\n' "${results[@]}" | sort -u) --out report
