#!/usr/bin/env bash
# Installs everything for NVIDIA GPUs into a virtual environment, from the pinned lock. Needs nvcc: flash-attn is
# compiled against the torch of the lock.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=${VENV:-.venv}
flash_attn=${FLASH_ATTN:-2.8.3}

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --no-deps --requirement requirements/cuda.txt
MAX_JOBS=${MAX_JOBS:-4} "$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation "flash-attn==$flash_attn"
"$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable .
