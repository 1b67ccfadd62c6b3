#!/usr/bin/env bash
# Fits the critics of known_noise.yaml to answers of the exam's starting policy: fit_exam_critics.sh EXAM ROLLOUTS OUT
set -euo pipefail
fit() { verl-dvpo pretrain-critic --model "$exam/model" --rollouts "$rollouts" --lr 1e-3 --epochs 12 "$@"; }
exam=$1 rollouts=$2 out=$3
mkdir -p "$out"
fit --out "$out/scalar" --family scalar
fit --out "$out/variance" --family gaussian
# the critic of dvpo_weighted
fit --out "$out/quantiles" --family quantile_ensemble --set levels=midpoint --set kappa=0 --set target=sample_replacement \
  --set constraint_statistics=level --set coef.cvar=0.02 --set coef.gain=0.02 --set coef.shift=0.02 --set coef.shape=0
