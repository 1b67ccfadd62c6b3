# SPDX-License-Identifier: Apache-2.0
"""The bounds by which a run's critic is judged, each with its reason.

Two measures of scale are used. The *spread of rewards* of a step is √((max − mean)·(mean − min)), the largest standard
deviation that rewards with these three figures can have (Bhatia and Davis); for rewards of 0 and 1 it is the standard
deviation. The *unexplained spread* is it times √(1 − explained variance): what a calibrated distribution is as wide as.
"""

from typing import Final

#: Steps that are needed to judge a trend: quarters of fewer hold no two values.
FEWEST_STEPS: Final = 8
#: The share at the end of a run that is judged, but for the explained variance. A critic starts from nothing, so the
#: beginning says nothing; an end this long has several steps in the shortest run that is judged.
LATE: Final = 0.25
#: The share at the end by which the explained variance is judged: it is the noisiest figure, and "for long" is the
#: complaint.
LONG: Final = 0.5

#: Explained variance below which the critic is worse than a constant. On rewards of pure noise an honest critic of the
#: study's runs stays within ±0.01, so this is no noise.
NEGATIVE: Final = -0.05
#: Share of the late steps that must be below 0: more than a critic without an opinion has, which is half.
NEGATIVE_SHARE: Final = 0.75
#: Explained variance above which the critic explains something; below it and above NEGATIVE it explains nothing.
SOMETHING: Final = 0.05
#: The range of all rewards over the median range of a step, from which rare extremes dominate every variance: rewards
#: in [0, 1] have 1.
EXTREMES: Final = 3.0

#: Spread of the values' distribution over the unexplained spread. Calibrated is 1; clean runs of the studies have 0.6,
#: and those with heavy-tailed rewards, whose extremes inflate the measure, at least 0.06.
COLLAPSED: Final = 0.03
#: The same, upwards: no distribution of such rewards is wider than 1, and a critic has had its first quarters to learn.
EXPLODED: Final = 3.0
#: The range of values over the spread of rewards: below it all tokens have one value. Critics of the studies have at
#: least 0.003, on heavy-tailed rewards, and above 0.1 on others.
FLAT: Final = 0.001

#: Share of adjacent quantiles out of order; ½ is no order at all. Runs of the studies end at 0.13 at most.
CROSSING: Final = 0.35
#: Disagreement of heads over the range of values: identical heads differ by float32's rounding, below 1e-6; those of
#: the studies' runs by at least 7e-3.
IDENTICAL: Final = 1e-4
#: Disagreement of heads over the unexplained spread, from which it is the heads that are uncertain and not the return.
#: Freshly drawn heads have 0.2 with rewards in [0, 1].
APART: Final = 1.0
#: Largest difference of two heads' weights over the largest weight, at which they are one head: float32's rounding.
SAME_WEIGHTS: Final = 1e-6

#: Share of targets that the support clips. A target at its end already loses half of its smoothing.
SATURATED: Final = 0.02
#: How far values lie outside all rewards so far, over the range of those. Bootstrapped λ-returns and costs in the
#: reward move the edge a little.
OUTSIDE: Final = 0.25
#: The margin, over the range of returns, of the support that is proposed: that of the family's default.
MARGIN: Final = 0.2

#: By how many times the loss's own scale the loss rises above its best: losses of the studies' runs, noisy ones among
#: them, rise by less than 3.
DIVERGED: Final = 5.0
#: Steps of the running median of the loss, so that one bad batch is no divergence.
SMOOTH: Final = 5
#: Below it a gradient's norm is rounding.
NO_GRADIENT: Final = 1e-8
#: Share of values that verl's value clipping stops, from which the clip and not the loss decides.
CLIPPED: Final = 0.3

#: Versions of the policy that a trajectory lags behind, on average: half of verl's own bound, max_off_policy_threshold.
STALE: Final = 4.0
#: Spread of rewards over that of the run's first quarter, below which there is nothing left to explain.
VANISHED: Final = 0.1
