#!/usr/bin/env bash
# Llama-3.1-70B on mathematics: bash examples/recipes/llama3_1_70b_math.sh [algorithm=ppo] [+preset=vapo] [any other override]
set -euo pipefail
folder=$(cd "$(dirname "$0")" && pwd)
exec python -m verl.trainer.main_ppo --config-dir "$folder" --config-name llama3_1_70b_math "$@"
