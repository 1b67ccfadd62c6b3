#!/usr/bin/env bash
# Samples answers of the demo's starting policy and fits the critic of `dvpo` to them: demo_critic.sh DEMO_FOLDER OUT
set -euo pipefail
export VERL_PLATFORM=cpu
dump=$(mktemp -d)
trap 'rm -rf "$dump"' EXIT
python -m verl_dvpo.train platform=cpu +task=demo demo.dir="$1" algorithm=grpo trainer.total_training_steps=16 \
  actor_rollout_ref.actor.optim.lr=0 trainer.rollout_data_dir="$dump" trainer.val_before_train=false trainer.test_freq=-1 \
  trainer.save_freq=-1 data.seed=100 actor_rollout_ref.rollout.seed=100 hydra.run.dir="$dump/hydra"
rm -rf "$dump/hydra"
verl-dvpo pretrain-critic --model "$1/model" --rollouts "$dump" --out "$2" --set num_heads=3 --set num_quantiles=200 \
  --lr 1e-3 --epochs 12
