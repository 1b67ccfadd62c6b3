#!/usr/bin/env bash
# Runs this package against another verl than the installed one; docs/support.md says what was run with which.
#
#   scripts/check_verl.sh 0.9.0         a release, fetched by pip
#   scripts/check_verl.sh ../verl       a checkout of verl, or an unpacked wheel
#
# Compares the table of changes, runs the unit tests of what touches verl, and trains two steps end to end. The
# installed packages stay as they are: verl goes into a temporary folder, in front of everything on Python's path.
set -euo pipefail

chosen=${1:?"usage: scripts/check_verl.sh VERSION_OR_PATH"}
[ -d "$chosen" ] && chosen=$(cd "$chosen" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ ! -d "$chosen" ]; then
  "$python" -m pip install --quiet --no-deps --target "$folder" "verl==$chosen"
elif compgen -G "$chosen/verl-*.dist-info" > /dev/null; then
  cp -r "$chosen/verl" "$chosen"/verl-*.dist-info "$folder"
else
  cp -r "$chosen" "$folder/source"  # building writes into the sources
  "$python" -m pip install --quiet --no-deps --no-build-isolation --target "$folder" "$folder/source"
  rm -rf "$folder/source"
fi
export PYTHONPATH="$folder:$PWD" VERL_PLATFORM=${VERL_PLATFORM:-cpu}

"$python" - <<'PYTHON'
import importlib.metadata, os, verl
print(f"verl {importlib.metadata.version('verl')} in {os.path.dirname(verl.__file__)}")
PYTHON
"$python" -m verl_dvpo.compat check
"$python" -m pytest -q -m "not e2e" tests/compat tests/test_configs.py tests/test_preflight.py tests/critic ${ARGS:-}
"$python" -m pytest -q "tests/test_e2e.py::test_two_steps_of_every_algorithm[dvpo]"
