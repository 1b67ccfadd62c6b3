# SPDX-License-Identifier: Apache-2.0
"""Symptoms of the distribution that a critic has learned, as its metrics show them."""

import numpy as np

from verl_dvpo.doctor import thresholds
from verl_dvpo.doctor.lines import Line, warning
from verl_dvpo.doctor.readings import Run
from verl_dvpo.doctor.symptoms import (
    COLLAPSED_FLOW,
    CROSSING,
    HEADS,
    OUTSIDE_SUPPORT,
    SPREAD,
    SYMPTOMS,
    ratio,
    rewards_vary,
    span,
    symptom,
    unexplained,
    value_range,
    verdict,
)

#: Of a distribution that has collapsed, or exploded.
WIDEN = (
    "a flow needs critic.value.coupling=calibrated; quantiles and histograms spread as returns do with "
    "critic.value.target=sample_replacement, quantiles also with critic.value.kappa=0"
)
NARROW = "lower critic.optim.lr, and critic.value.value_scale of a flow"
#: Of heads that are one, or too far apart.
DIVIDE = (
    "lower critic.value.coef.consistency, let heads see data of their own (algorithm=robust_bellman, "
    "critic.value.heads_see=bootstrap), or draw them anew with critic.value.head_from=seed"
)
UNITE = "raise critic.value.coef.consistency, or train longer"


@symptom(
    "spread",
    sign="collapsed: the distribution has shrunk to a point, and the critic is a scalar one; exploded: it is wider "
    "than any distribution of such rewards",
    remedy=f"collapsed: {WIDEN}; exploded: {NARROW}",
)
def spread(run: Run) -> Line | None:
    curve = run.curve(SPREAD)
    if curve is None:
        return None
    late = curve.last(thresholds.LATE)
    said = run.curve(COLLAPSED_FLOW)
    said_at = said.steps[np.isin(said.steps, late.steps)] if said is not None else np.array([])
    if len(said_at) * 2 > len(late):
        text = f"{late.median:.3g}; the flow has collapsed in {len(said_at)} of {len(late)} steps, {span(late)}"
        return verdict("spread", text, curve.values, bad=True, fix=WIDEN)
    found = ratio(curve, unexplained(run))
    if found is None or not rewards_vary(run):
        return None
    text = f"{late.median:.3g}, {found:.2g} of the unexplained spread, in {span(late)} (median)"
    if found < thresholds.COLLAPSED or found > thresholds.EXPLODED:
        which, fix = ("collapsed", WIDEN) if found < thresholds.COLLAPSED else ("exploded", NARROW)
        return verdict("spread", f"{which}: {text}", curve.values, bad=True, fix=fix)
    return verdict("spread", text, curve.values, bad=False)


@symptom(
    "crossing",
    sign="quantiles are in no order before they are sorted: they are noise more than a distribution",
    remedy="lower critic.optim.lr, or critic.value.num_quantiles",
)
def crossing(run: Run) -> Line | None:
    curve = run.curve(CROSSING)
    if curve is None:
        return None
    late = curve.last(thresholds.LATE)
    text = f"{late.median:.0%} of adjacent quantiles are out of order in {span(late)} (median)"
    return verdict("crossing", text, curve.values, bad=late.median > thresholds.CROSSING, made=warning)


@symptom(
    "heads",
    sign="the heads of an ensemble are one head, or disagree more than the return varies",
    remedy=f"identical: {DIVIDE}; apart: {UNITE}",
)
def heads(run: Run) -> Line | None:
    curve = run.curve(HEADS)
    found = ratio(curve, value_range(run))
    if curve is None or found is None:
        return None
    late = curve.last(thresholds.LATE)
    text = f"heads differ by {late.median:.3g}, {found:.2g} of the range of values, in {span(late)} (median)"
    if found < thresholds.IDENTICAL:
        return verdict("heads", f"identical: {text}", curve.values, bad=True, fix=DIVIDE)
    apart = ratio(curve, unexplained(run))
    if apart is not None and rewards_vary(run) and apart > thresholds.APART:
        wide = f"{apart:.2g} of the unexplained spread"
        text = f"apart: heads differ by {late.median:.3g}, {wide}, in {span(late)} (median)"
        return verdict("heads", text, curve.values, bad=True, made=warning, fix=UNITE)
    return verdict("heads", text, curve.values, bad=False)


@symptom(
    "support",
    sign="returns lie outside of a histogram's support and are clipped to its end",
    remedy="set critic.value.value_min and critic.value.value_max to the range of the returns and a margin, and "
    "critic.value.num_bins so that a bin stays as wide",
)
def support(run: Run) -> Line | None:
    curve = run.curve(OUTSIDE_SUPPORT)
    if curve is None:
        return None
    late = curve.last(thresholds.LATE)
    text = f"{late.median:.1%} of targets are outside of the support in {span(late)} (median)"
    bad = late.median > thresholds.SATURATED
    ends = run.setting("critic.value.value_min"), run.setting("critic.value.value_max")
    if bad and None not in ends:
        text += f"; the support is {ends[0]} to {ends[1]}"
    return verdict("support", text, curve.values, bad=bad, fix=support_remedy(run))


def support_remedy(run: Run) -> str:
    """Says which support fits: the range of the late returns with the margin of the family's default."""
    low, high = run.curve("critic/returns/min"), run.curve("critic/returns/max")
    if low is None or high is None:
        return SYMPTOMS["support"].remedy
    bottom = float(np.nanmin(low.last(thresholds.LONG).values))
    top = float(np.nanmax(high.last(thresholds.LONG).values))
    margin = thresholds.MARGIN * (top - bottom)
    return (
        f"critic.value.value_min={bottom - margin:.3g} critic.value.value_max={top + margin:.3g}: returns were from "
        f"{bottom:.3g} to {top:.3g}; more critic.value.num_bins keep a bin as wide"
    )
