#!/usr/bin/env bash
# All that needs a GPU, within 9 minutes, on whatever PyTorch is there: what of it was seen, docs/gpu.md says.
#     bash script/gpu.sh                            # into gpu/: a table and a log of each part, and bench.json
#     bash script/gpu.sh --only steps,prefill       # some of the parts
#     bash script/gpu.sh --device cpu --short       # the same commands on tiny shapes, to see that they run
# Parts: tests (pytest -m cuda), kernels (script/decode_kernels.py), steps (decode steps of the small model's shape at
# batch 1, 128, 32 and 8, squeezed, compiled, graphed and peers), prefill (H2O's beside the fused one, 4k to 32k tokens),
# llama (a step of Llama-3.1-8B's shape, 32 x 8,192 tokens), throughput (Mistral-7B's shape at full memory). Weights are
# made up: no model is needed. A part that takes longer than it may is ended, and said; what squeeze.bench had measured
# is kept.
# Other flags: --out FOLDER (default: gpu), --python PROGRAM (default: the project's environment, else python3).
set -euo pipefail
script=$(realpath "$0") from=$PWD
cd "$(dirname "$script")/.."

stop() { echo "error: $1" >&2; exit 2; }
parts=tests,kernels,steps,prefill,llama,throughput
device=cuda only=$parts out=gpu short= python=.venv/bin/python
[ -x "$python" ] || python=python3
while [ $# -gt 0 ]; do
    case $1 in
    --device) device=${2:?--device needs cuda, cuda:N or cpu}; shift ;;
    --only) only=${2:?--only needs parts}; shift ;;
    --out) out=${2:?--out needs a folder}; [[ $out == /* ]] || out=$from/$out; shift ;;
    --python) python=${2:?--python needs a program}; shift ;;
    --short) short=1 ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$script"; exit ;;
    *) stop "$1 is no option of this script: --only, --out, --device, --python or --short (--help explains them)" ;;
    esac
    shift
done
IFS=, read -ra wanted <<< "$only"
for part in "${wanted[@]}"; do
    [[ ,$parts, == *,"$part",* ]] || stop "--only takes $parts, not $part"
done
"$python" -c 'import torch, transformers, sklearn, msgspec' 2> /dev/null || stop "$python lacks what requirements.txt names"
if [[ $device == cuda* ]]; then
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || stop "$python finds no GPU"
fi
mkdir -p "$out"
small=config/shapes/smollm2-135m.json failed=

part() { # NAME SECONDS COMMAND: its table goes to NAME.md, all else to NAME.log
    [[ ,$only, == *,${1%-*},* ]] || return 0
    local start=$SECONDS code=0
    timeout --kill-after 5 "$2" "${@:3}" > "$out/$1.md" 2> "$out/$1.log" || code=$?
    case $code in
    0) echo "$1: $((SECONDS - start)) s, $out/$1.md" ;;
    124 | 137) echo "$1: not finished after $2 s, what there is lies in $out/$1.log and $out/$1" ;;
    *) failed=1; echo "$1: failed after $((SECONDS - start)) s: $(cat "$out/$1.md" "$out/$1.log" | tail -n 1)" ;;
    esac
}
bench() { # NAME SECONDS, and flags of squeeze.bench
    part "$1" "$2" "$python" -m squeeze.bench --device "$device" --dtype bfloat16 --out "$out/$1" "${@:3}"
}

if [ -n "$short" ]; then
    sizes=(--prompt_length 96 --new_tokens 5 --rounds 1)
    part tests 300 "$python" -m pytest -q -m cuda --co
    part kernels 300 "$python" script/decode_kernels.py --device "$device" --short
    bench steps 300 --random_weights $small --batch_size 1 --peers --caches full squeezed "${sizes[@]}"
    bench prefill-96 300 --random_weights $small --batch_size 1 --algorithm h2o --caches full --peers "${sizes[@]}"
    bench throughput 300 --throughput --random_weights $small --batch_size 1 2 --caches squeezed "${sizes[@]}"
else
    part tests-graphs 40 "$python" -m pytest -q -m cuda -k "recorded"
    part tests 50 "$python" -m pytest -q -m cuda -k "not recorded"
    part kernels 25 "$python" script/decode_kernels.py --device "$device"
    bench steps 150 --random_weights $small --batch_size 1 128 32 8 --prompt_length 2048 --new_tokens 33 --rounds 1 \
        --caches squeezed compiled graphed --peers
    for tokens in 4096 16384 32768; do
        bench prefill-$tokens 30 --random_weights $small --batch_size 1 --prompt_length $tokens --new_tokens 3 --rounds 1 \
            --algorithm h2o streaming --caches full
    done
    bench llama 85 --random_weights config/shapes/llama-3.1-8b.json --batch_size 32 --prompt_length 8192 --rounds 1 \
        --new_tokens 33 --caches squeezed --peers
    bench throughput 100 --throughput --preset mistral-7b --batch_size 64 224 --new_tokens 129 --rounds 1 \
        --caches squeezed
fi
[ -z "$failed" ] || stop "not all parts ran: the logs in $out say why"
