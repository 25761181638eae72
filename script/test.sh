#!/usr/bin/env bash
# All the set-up, then the tests. Arguments go to pytest: `script/test.sh -m slow` runs the long ones.
set -euo pipefail
cd "$(dirname "$0")/.."
bash script/setup.sh dev

export HF_HUB_OFFLINE=1 TQDM_DISABLE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/lint-imports
.venv/bin/python -m pytest -n 2 --dist loadfile "$@"
