#!/usr/bin/env bash
# Fits four critics to answers of the exam's starting policy: fit_exam_critics.sh EXAM ROLLOUTS OUT [OPTION...]
# EPOCHS: of each fit at most. The options are those of pretrain-critic, for the variance head alone: the held-out score may not know its best.
set -euo pipefail
exam=$1 rollouts=$2 out=$3
shift 3
fit() { verl-dvpo pretrain-critic --model "$exam/model" --rollouts "$rollouts" --lr 1e-3 --epochs "${EPOCHS:-8}" "$@"; }
mkdir -p "$out"
# the critic of dvpo_weighted
fit --out "$out/quantiles" --family quantile_ensemble --set levels=midpoint --set kappa=0 --set target=sample_replacement \
  --set constraint_statistics=level --set coef.cvar=0.02 --set coef.gain=0.02 --set coef.shift=0.02 --set coef.shape=0
fit --out "$out/scalar" --family scalar
fit --out "$out/huber" --family scalar --set huber=0.5
fit --out "$out/variance" --family gaussian "$@"
