#!/usr/bin/env bash
# examples/qwen3_1_7b_fsdp2.sh data.train_files=... data.val_files=... [algorithm=dvpo] [any other override]
set -euo pipefail
exec python -m verl.trainer.main_ppo --config-name dvpo_trainer +recipe=qwen3_1_7b_fsdp2 "$@"
