#!/usr/bin/env bash
# Samples answers of the exam's starting policy and fits a scalar critic to them: exam_critic.sh EXAM_FOLDER OUT
set -euo pipefail
export VERL_PLATFORM=cpu
dump=$(mktemp -d)
trap 'rm -rf "$dump"' EXIT
python -m verl_dvpo.train platform=cpu +task=exam exam.dir="$1" algorithm=reinforce_plus_plus trainer.total_training_steps=32 \
  actor_rollout_ref.actor.optim.lr=0 trainer.rollout_data_dir="$dump" trainer.val_before_train=false trainer.test_freq=-1 \
  trainer.save_freq=-1 data.seed=100 actor_rollout_ref.rollout.seed=100 hydra.run.dir="$dump/hydra"
rm -rf "$dump/hydra"
verl-dvpo pretrain-critic --model "$1/model" --rollouts "$dump" --out "$2" --family scalar --lr 1e-3 --epochs 12
