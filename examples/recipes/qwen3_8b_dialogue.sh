#!/usr/bin/env bash
# Qwen3-8B on dialogues: bash examples/recipes/qwen3_8b_dialogue.sh [algorithm=ppo] [+preset=vapo] [any other override]
set -euo pipefail
folder=$(cd "$(dirname "$0")" && pwd)
exec python -m verl.trainer.main_ppo --config-dir "$folder" --config-name qwen3_8b_dialogue "$@"
