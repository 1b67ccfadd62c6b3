# SPDX-License-Identifier: Apache-2.0
"""The mathematics of distributional critics in pure torch: levels, targets, losses and metrics.

Each file has one topic, and nothing here imports verl. docs/method.md holds every equation and the legend of shapes.
"""

from .config import CONSTRAINT_TERMS, TERMS, DVPOLossConfig
from .constraints import MULTIPLIERS, constraint_multipliers
from .levels import quantile_levels
from .losses import DVPOLoss, dvpo_loss, risk_weights
from .metrics import (
    coverage,
    crossing_fraction,
    crps,
    ensemble_std,
    explained_variance,
    explained_variance_sums,
    masked_sums,
    pit,
    spread,
    tail_mean,
)
from .quantile_huber import quantile_huber_loss
from .returns import distributional_gae, sample_replacement_returns

__all__ = [
    "CONSTRAINT_TERMS",
    "MULTIPLIERS",
    "TERMS",
    "DVPOLoss",
    "DVPOLossConfig",
    "constraint_multipliers",
    "coverage",
    "crossing_fraction",
    "crps",
    "distributional_gae",
    "dvpo_loss",
    "ensemble_std",
    "explained_variance",
    "explained_variance_sums",
    "masked_sums",
    "pit",
    "quantile_huber_loss",
    "quantile_levels",
    "risk_weights",
    "sample_replacement_returns",
    "spread",
    "tail_mean",
]
