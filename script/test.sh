#!/usr/bin/env bash
# All the set-up, then the tests. Arguments go to pytest: `script/test.sh -m slow` runs the long ones.
set -euo pipefail
cd "$(dirname "$0")/.."
bash script/setup.sh dev

# Two processes, with half of the cores each: threads of both on one core would wait for each other.
OMP_NUM_THREADS=$(.venv/bin/python -c 'import os; print(max(1, (os.cpu_count() or 1) // 2))')
export HF_HUB_OFFLINE=1 TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 OMP_NUM_THREADS
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
