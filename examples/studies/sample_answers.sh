#!/usr/bin/env bash
# Dumps answers of a task's starting policy, which does not learn: sample_answers.sh OUT STEPS OVERRIDE...
# `verl-dvpo pretrain-critic --rollouts OUT` reads them. Noise among the overrides is in their scores.
set -euo pipefail
export VERL_PLATFORM=cpu
out=$1 steps=$2
shift 2
mkdir -p "$out"
hydra=$(mktemp -d)
trap 'rm -rf "$hydra"' EXIT
python -m verl_dvpo.train platform=cpu algorithm=reinforce_plus_plus trainer.total_training_steps="$steps" \
  actor_rollout_ref.actor.optim.lr=0 trainer.rollout_data_dir="$out" trainer.val_before_train=false trainer.test_freq=-1 \
  trainer.save_freq=-1 data.seed=100 actor_rollout_ref.rollout.seed=100 hydra.run.dir="$hydra" "$@"
