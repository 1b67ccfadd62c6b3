#!/usr/bin/env bash
# Qwen2.5-72B on mathematics: bash examples/recipes/qwen2_5_72b_math.sh [algorithm=ppo] [+preset=vapo] [any other override]
set -euo pipefail
folder=$(cd "$(dirname "$0")" && pwd)
exec python -m verl.trainer.main_ppo --config-dir "$folder" --config-name qwen2_5_72b_math "$@"
