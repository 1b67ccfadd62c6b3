# SPDX-License-Identifier: Apache-2.0
"""Symptoms of a critic, each read from the metrics that verl and our critics log.

A symptom returns None where a run does not log what it needs; so runs of verl's own PPO are judged by what they have.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from verl_dvpo.doctor import thresholds
from verl_dvpo.doctor.lines import Line, ok, problem, sparkline, warning
from verl_dvpo.doctor.readings import Curve, Run

EXPLAINED, LOSS = "critic/vf_explained_var", "critic/vf_loss"
SPREAD, CROSSING, HEADS = "critic/quantile/spread", "critic/quantile/crossing_fraction", "critic/ensemble/std"
OUTSIDE_SUPPORT, COLLAPSED_FLOW = "critic/hl_gauss/out_of_support", "critic/flow/collapsed"
#: Of our trainers, and of verl's.
STALENESS = ("critic/staleness/mean", "training/off_policy/trajectory_staleness/mean")

Judge = Callable[[Run], Line | None]
#: ``warning`` or ``problem``.
Made = Callable[[str, str, str, str], Line]


@dataclass(frozen=True)
class Symptom:
    """One thing that can be wrong.

    Attributes:
        name: in the report.
        sign: what the metrics show then.
        remedy: what to do, with the settings to change.
        judge: reads it from a run; None where the run does not log what it needs.
        trend: whether a run must have ``FEWEST_STEPS`` for it.
    """

    name: str
    sign: str
    remedy: str
    judge: Judge
    trend: bool


SYMPTOMS: dict[str, Symptom] = {}


def symptom(name: str, *, sign: str, remedy: str, trend: bool = True) -> Callable[[Judge], Judge]:
    """Registers a symptom in the order of the report."""

    def register(judge: Judge) -> Judge:
        SYMPTOMS[name] = Symptom(name, sign, remedy, judge, trend)
        return judge

    return register


def has_critic(run: Run) -> bool:
    """Tells whether the run has logged values of a critic."""
    return any(run.curve(name) is not None for name in ("critic/values/mean", LOSS, "critic/vpred_mean"))


def judge(run: Run) -> Iterator[Line]:
    """Yields a line for each symptom that the run's metrics can tell of."""
    steps = max((len(curve) for name, curve in run.curves.items() if name.startswith("critic/")), default=0)
    for each in SYMPTOMS.values():
        if (not each.trend or steps >= thresholds.FEWEST_STEPS) and (line := each.judge(run)) is not None:
            yield line


def verdict(name: str, text: str, values: Iterable[float], *, bad: bool, made: Made = problem, fix: str = "") -> Line:
    """Makes the line of a symptom with its picture: ``made`` with the symptom's remedy, or ``fix``, where it is bad."""
    picture = sparkline(values)
    return made(name, text, fix or SYMPTOMS[name].remedy, picture) if bad else ok(name, text, picture)


def _shared(run: Run, *names: str) -> tuple[NDArray[np.int64], list[NDArray[np.float64]]] | None:
    """Returns the steps at which all of these were logged, and their values; None where there are none."""
    curves = [curve for name in names if (curve := run.curve(name)) is not None]
    if len(curves) < len(names):
        return None
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    return (steps, [c.values[np.isin(c.steps, steps)] for c in curves]) if steps.size else None


def reward_spread(run: Run) -> Curve | None:
    """Computes the spread of rewards of each step, as ``thresholds`` defines it; None if rewards are not logged."""
    found = _shared(run, "critic/rewards/min", "critic/rewards/mean", "critic/rewards/max")
    if found is None:
        return None
    steps, (low, mean, high) = found
    return Curve(steps, np.sqrt(np.clip((high - mean) * (mean - low), 0.0, None)))


def unexplained(run: Run) -> Curve | None:
    """Computes the unexplained spread of each step; None if rewards or the explained variance are not logged."""
    spread, explained = reward_spread(run), run.curve(EXPLAINED)
    if spread is None or explained is None:
        return None
    steps, at, other = np.intersect1d(spread.steps, explained.steps, return_indices=True)
    return Curve(steps, spread.values[at] * np.sqrt(np.clip(1.0 - explained.values[other], 0.0, 1.0)))


def value_range(run: Run) -> Curve | None:
    """Computes the largest minus the smallest value of each step."""
    found = _shared(run, "critic/values/min", "critic/values/max")
    return None if found is None else Curve(found[0], found[1][1] - found[1][0])


def ratio(above: Curve | None, below: Curve | None, share: float = thresholds.LATE) -> float | None:
    """Divides the late medians of two curves; None where there is nothing to divide, or by."""
    if above is None or below is None or not below.last(share).median > 0:
        return None
    found = above.last(share).median / below.last(share).median
    return found if np.isfinite(found) else None


def rewards_vary(run: Run) -> bool:
    """Tells whether the late rewards vary enough to explain anything."""
    spread = reward_spread(run)
    if spread is None:
        return True
    late, early = spread.last(thresholds.LATE).median, spread.first(thresholds.LATE).median
    return late > 0 and not late < thresholds.VANISHED * early


def span(curve: Curve) -> str:
    """Names the steps of a curve."""
    first, last = int(curve.steps[0]), int(curve.steps[-1])
    return f"step {last}" if first == last else f"steps {first} to {last}"


@symptom(
    "not a number",
    sign="a figure of the critic is NaN or infinite",
    remedy="lower critic.optim.lr and critic.grad_clip, and resume from a checkpoint before that step; on GPUs see "
    "whether it goes away with +critic.fsdp.mixed_precision.param_dtype=fp32",
    trend=False,
)
def not_a_number(run: Run) -> Line | None:
    bad = {
        name: curve
        for name, curve in run.curves.items()
        if name.startswith("critic/") and not np.isfinite(curve.values).all()
    }
    if not bad:
        return ok("not a number", "every figure is finite")
    first = {name: int(curve.steps[~np.isfinite(curve.values)][0]) for name, curve in bad.items()}
    name = min(first, key=lambda each: (first[each], each))
    count = int((~np.isfinite(bad[name].values)).sum())
    text = f"{name} is NaN or infinite from step {first[name]} on, in {count} of {len(bad[name])} steps"
    others = f"; so are {len(bad) - 1} other figures" if len(bad) > 1 else ""
    return verdict("not a number", text + others, bad[name].values, bad=True)


@symptom(
    "rewards",
    sign="the rewards of a step are all the same, or have nearly stopped to vary: no critic can explain them",
    remedy="look at the reward function and at answers: critic/score/mean, response_length/clip_ratio; prompts that "
    "are always or never solved teach nothing, so change data.train_files; if the policy has collapsed, lower "
    "actor_rollout_ref.actor.optim.lr",
)
def rewards(run: Run) -> Line | None:
    spread = reward_spread(run)
    if spread is None:
        return None
    late, before = spread.last(thresholds.LATE), spread.first(thresholds.LATE)
    text = f"spread of rewards {late.median:.3g} in {span(late)}, {before.median:.3g} in {span(before)}"
    return verdict("rewards", text, spread.values, bad=not rewards_vary(run), made=warning)


@symptom(
    "explained variance",
    sign="below 0 for long: values are worse than a constant; near 0: they tell good answers from bad ones no better",
    remedy="give the critic a start with trainer.critic_warmup or `verl-dvpo pretrain-critic`, let it see whole "
    "returns with critic.value.lam=1.0 (with verl's own critic: algorithm.lam=1.0), and try another critic.optim.lr",
)
def explained_variance(run: Run) -> Line | None:
    curve = run.curve(EXPLAINED)
    if curve is None or not rewards_vary(run):
        return None
    late = curve.last(thresholds.LONG)
    below = int((late.values < 0).sum())
    text = f"{late.median:.3f} in {span(late)} (median), below 0 in {below} of {len(late)}"
    if late.median < thresholds.NEGATIVE and below >= thresholds.NEGATIVE_SHARE * len(late):
        return verdict("explained variance", text, curve.values, bad=True)
    nothing, fix = late.median < thresholds.SOMETHING, ""
    found = _shared(run, "critic/rewards/min", "critic/rewards/max")
    if nothing and found is not None:
        low, high = found[1]
        if high.max() - low.min() > thresholds.EXTREMES * np.median(high - low):
            text += f"; rewards reach from {low.min():.3g} to {high.max():.3g}, and few extremes make their variance"
            fix = EXTREMES_REMEDY
    return verdict("explained variance", text, curve.values, bad=nothing, made=warning, fix=fix)


#: Where variances are those of a few extreme rewards.
EXTREMES_REMEDY = (
    "values may be right all the same: explained variance cannot tell here. critic.value.huber=0.5 (algorithm=ppo) or "
    "algorithm=dvpo_calibrated resist extremes, and algorithm.value.reward=winsorised takes them from the advantages"
)


@symptom(
    "value loss",
    sign="it rises far above its best, and rewards have not become wilder",
    remedy="lower critic.optim.lr, by ten at first, or critic.grad_clip; fewer critic.ppo_epochs on the same batch",
)
def value_loss(run: Run) -> Line | None:
    curve = run.curve(LOSS)
    if curve is None or not np.isfinite(curve.values).all():
        return None
    windows = np.lib.stride_tricks.sliding_window_view(curve.values, min(thresholds.SMOOTH, len(curve)))
    smooth, late = np.median(windows, axis=1), curve.last(thresholds.LATE)
    best = float(smooth.min())
    scale = max(abs(best), float(smooth[0]) - best)
    spread = reward_spread(run)
    wilder = 1.0
    if spread is not None and (before := spread.first(thresholds.LATE).median) > 0:
        wilder = max(1.0, spread.last(thresholds.LATE).median / before) ** 2  # a squared error grows by the square
    text = f"{late.median:.3g} in {span(late)} (median), best {best:.3g}"
    return verdict("value loss", text, curve.values, bad=late.median - best > thresholds.DIVERGED * scale * wilder)


@symptom(
    "learning",
    sign="the critic's gradient or its learning rate is 0",
    remedy="set critic.optim.lr above 0 and critic.optim.lr_warmup_steps below the length of the run; with a gradient "
    "of 0 draw the head anew with critic.value.head_from=seed and critic.value.head_seed=1, and see that the "
    "coefficients in critic.value.coef are not all 0",
)
def learning(run: Run) -> Line | None:
    norm, rate = run.curve("critic/grad_norm"), run.curve("critic/lr")
    if norm is None:
        return None
    late = norm.last(thresholds.LATE)
    text = f"gradient {late.median:.3g} in {span(late)} (median norm)"
    if rate is not None:
        text += f", learning rate {rate.last(thresholds.LATE).median:.3g}"
    still = rate is not None and rate.last(thresholds.LATE).median == 0
    return verdict("learning", text, norm.values, bad=late.median < thresholds.NO_GRADIENT or still)


@symptom(
    "one value for all",
    sign="the values of all tokens are the same",
    remedy="raise critic.optim.lr, give the critic a start with trainer.critic_warmup, or another head with "
    "critic.value.head_width=64; see that its backbone is trained",
)
def one_value(run: Run) -> Line | None:
    values = value_range(run)
    found = ratio(values, reward_spread(run))
    if values is None or found is None or not rewards_vary(run):
        return None
    late = values.last(thresholds.LATE)
    text = f"values differ by {late.median:.3g}, {found:.2g} of the spread of rewards, in {span(late)}"
    return verdict("one value for all", text, values.values, bad=found < thresholds.FLAT)


@symptom(
    "values and rewards",
    sign="values lie outside of every reward that the run has seen",
    remedy="lower critic.optim.lr, let targets bootstrap less with critic.value.lam=1.0 (with verl's own critic: "
    "algorithm.lam=1.0), and see that algorithm.gamma is at most 1",
)
def values_and_rewards(run: Run) -> Line | None:
    names = ("critic/values/min", "critic/values/max", "critic/rewards/min", "critic/rewards/max")
    found = _shared(run, *names)
    if found is None or not all(np.isfinite(values).all() for values in found[1]):
        return None
    steps, (low, high, worst, best) = found
    worst, best = np.minimum.accumulate(worst), np.maximum.accumulate(best)
    beyond = np.maximum(np.maximum(worst - low, high - best), 0.0)
    width = np.where(best > worst, best - worst, np.nan)
    outside = Curve(steps, beyond / width).last(thresholds.LATE)
    if not np.isfinite(outside.median):
        return None
    text = (
        f"values from {low[-1]:.3g} to {high[-1]:.3g} in step {steps[-1]}, rewards so far from {worst[-1]:.3g} to "
        f"{best[-1]:.3g}; {outside.median:.2g} of that range outside in {span(outside)} (median)"
    )
    bad = outside.median > thresholds.OUTSIDE
    return verdict("values and rewards", text, beyond if bad else high, bad=bad)


@symptom(
    "value clipping",
    sign="verl's clip of values stops most of them, so the clip decides how fast the critic learns",
    remedy="raise critic.cliprange_value to the size of the rewards",
)
def value_clipping(run: Run) -> Line | None:
    curve = run.curve("critic/vf_clipfrac")
    if curve is None:
        return None
    late = curve.last(thresholds.LATE)
    text = f"{late.median:.0%} of values are clipped in {span(late)} (median)"
    return verdict("value clipping", text, curve.values, bad=late.median > thresholds.CLIPPED, made=warning)


@symptom(
    "staleness",
    sign="answers come from a policy that is many updates old, and values of them too",
    remedy="lower trainer.v1.sampler.max_off_policy_threshold, or give the rollout more devices",
)
def staleness(run: Run) -> Line | None:
    curve = next((found for name in STALENESS if (found := run.curve(name)) is not None), None)
    if curve is None:
        return None
    late = curve.last(thresholds.LATE)
    text = f"{late.median:.2g} versions in {span(late)} (median)"
    return verdict("staleness", text, curve.values, bad=late.median > thresholds.STALE, made=warning)
