# SPDX-License-Identifier: Apache-2.0
"""What each metric means, for the glossary; ``tests/documents/test_glossary.py`` holds it against a real update.

``*`` stands for a name that the code fills in. Units are those of the reward, if "reward".
"""

#: Metrics of this package: name -> (unit or range, meaning).
OURS: dict[str, tuple[str, str]] = {
    "critic/vpred_mean": (
        "reward",
        "Mean value over valid tokens, during the update: what the family's `value` makes of the outputs.",
    ),
    "critic/loss/*": (
        "",
        "One term of the family's loss, without its coefficient, averaged as the loss is; see "
        "[method](../method.md), sections 2, 4 and 7.",
    ),
    "critic/multiplier/*": (
        "",
        "Multiplier of a constraint in this update, from the violation's mean over all ranks; see "
        "[method](../method.md), section 4.",
    ),
    "critic/share/*": (
        "share in [0, 1]",
        "A term's part of the gradient's norms at the head's outputs; every `critic.value.share_every` steps.",
    ),
    "critic/inferred_again": (
        "0 or 1",
        "1 if sequences of the update had to be inferred again, because nothing was kept of them.",
    ),
    "critic/quantile/q10": (
        "reward",
        "The 10 % quantile of the return, mean over valid tokens. Inference before the update.",
    ),
    "critic/quantile/q50": ("reward", "The median, likewise."),
    "critic/quantile/q90": ("reward", "The 90 % quantile, likewise."),
    "critic/quantile/spread": (
        "reward",
        "Standard deviation of a state's distribution, mean over valid tokens. Near 0 it has collapsed.",
    ),
    "critic/quantile/sigma": (
        "reward",
        "The spread that the actor's options read (`algorithm.value`), mean over valid tokens.",
    ),
    "critic/quantile/crossing_fraction": (
        "share in [0, 1]",
        "Neighbouring quantiles that are out of order before they are sorted.",
    ),
    "critic/ensemble/std": ("reward", "Standard deviation of the heads' values, mean over valid tokens."),
    "critic/ensemble/quantile_std": (
        "reward",
        "Standard deviation over heads of each quantile, mean over quantiles and valid tokens.",
    ),
    "critic/ensemble/below_mean": (
        "reward",
        "How far the minimum over heads lies below their mean (`robust_bellman`).",
    ),
    "critic/hl_gauss/out_of_support": (
        "share in [0, 1]",
        "Valid tokens whose target lies outside the histogram's support and is clipped.",
    ),
    "critic/flow/one_step_gap": (
        "reward",
        "Mean distance of a one-step sample from its many-step one; with `critic.value.euler_steps` above 1.",
    ),
    "critic/flow/collapsed": (
        "1",
        "Logged in a step in which the flow's spread is below `critic.value.collapse_threshold` of the rewards'.",
    ),
    "critic/auto/crps_*": (
        "reward",
        "CRPS of a number of levels on returns that the critic has not learned from; see "
        "[method](../method.md), section 7c.",
    ),
    "critic/auto/error_*": ("reward²", "Squared error of the mean of a number of levels, likewise."),
    "critic/auto/risk_crps_*": ("reward", "CRPS with a risk weight, likewise."),
    "critic/auto/num_quantiles": ("count", "The number of levels that is chosen now."),
    "critic/auto/risk": ("share in [0, 1]", "The risk weight that is chosen now."),
    "critic/staleness/mean": (
        "updates",
        "How many updates of the policy lie between an answer's first token and this step; mean over answers.",
    ),
    "critic/staleness/max": ("updates", "The most of them."),
    "advantages/lam": ("[0, 1]", "Mean trace of the actor's advantage, with `algorithm.value.lam_actor=length`."),
    "advantages/effective_share": (
        "share in (0, 1]",
        "Effective number of tokens under the weights over their number; 1 if all weigh the same.",
    ),
    "advantages/readout_level": (
        "share in (0, 1]",
        "The level of `cvar` that `algorithm.value.readout_level=auto` took for the batch.",
    ),
    "advantages/gate_gain": ("[0, 1]", "Mean gain of `algorithm.value.reward=gated`."),
    "advantages/reward_change": (
        "reward",
        "Mean over answers of the absolute change that `algorithm.value.reward` made.",
    ),
    "actor/flowrl_weight": ("ratio", "Mean clipped importance weight of an answer (`algorithm=flowrl`)."),
    "noise/unscored/mean": ("share in [0, 1]", "Answers without a clean score, which noise left alone."),
    "noise/clean_score/mean": ("reward", "Mean of the rewards before the noise."),
    "noise/score/mean": ("reward", "Mean of the rewards that the algorithm gets."),
    "noise/noisy_score/mean": (
        "reward",
        "Mean of the rewards after the noise and before a correction; only with a correction.",
    ),
    "noise/corrupted/mean": ("share in [0, 1]", "Answers whose reward the noise changed."),
    "noise/error/mean": ("reward", "Mean of noisy minus clean reward."),
    "noise/error/abs_mean": ("reward", "Mean of its absolute value."),
    "noise/majority_right/mean": (
        "share in [0, 1]",
        "Rewards that are the clean ones after `noise.correction.kind=majority`.",
    ),
    "noise/fpr": ("share in [0, 1]", "Wrong answers that pass, before a correction."),
    "noise/fnr": ("share in [0, 1]", "Right answers that fail, before a correction."),
    "noise/youden_j": ("[-1, 1]", "1 - FPR - FNR: below 0 the reward says the opposite of the truth."),
    "critic_values/fan": (
        "image",
        "The value distribution along a few answers; every `critic.value.dump_every` steps, with TensorBoard or W&B.",
    ),
    "critic_values/calibration": ("image", "PIT, coverage and bias of the same answers."),
}

#: Metrics of verl itself that a reader of a critic looks at; what they mean with this package.
VERLS: dict[str, tuple[str, str]] = {
    "critic/vf_loss": ("", "The family's loss, with all its terms; with verl's own critic the squared error."),
    "critic/vf_explained_var": (
        "at most 1",
        "1 - var(R - V)/var(R) over valid tokens, R the λ-return. Below 0 the values are worse than a constant.",
    ),
    "critic/grad_norm": ("", "Norm of the critic's gradient before clipping."),
    "critic/loss": ("", "The loss that is differentiated, summed over the micro-batches of an update."),
    "critic/mfu": (
        "share in [0, 1]",
        "Operations of an update against the peak of the devices, as verl estimates them.",
    ),
    "critic/lr": ("", "Learning rate of the critic."),
    "critic/score/mean": ("reward", "Mean reward of an answer, before a KL penalty."),
    "critic/rewards/mean": ("reward", "The same with the penalty; with `flowrl` that of the balance."),
    "critic/advantages/mean": ("", "Mean of the actor's advantages, after whitening."),
    "critic/returns/mean": ("reward", "Mean λ-return."),
    "critic/values/mean": ("reward", "Mean value of the states that the actor's advantages rest on."),
    "actor/pg_loss": ("", "The policy's loss."),
    "actor/pg_clipfrac": ("share in [0, 1]", "Tokens whose probability ratio is clipped."),
    "actor/ppo_kl": (
        "nats",
        "Mean of old minus new log-probability; on `platform=cpu` against the sampler's own probabilities.",
    ),
    "actor/entropy": ("nats", "Mean entropy of the policy's next token."),
    "actor/grad_norm": ("", "Norm of the policy's gradient before clipping."),
    "response_length/mean": ("tokens", "Mean length of an answer."),
    "response_length/clip_ratio": ("share in [0, 1]", "Answers that were cut at the longest length."),
    "perf/time_per_step": ("s", "Wall-clock time of a step."),
    "perf/max_memory_allocated_gb": ("GiB", "Most memory of tensors on a device so far; 0 without an accelerator."),
    "perf/max_memory_reserved_gb": ("GiB", "The same with what torch keeps for later."),
    "perf/cpu_memory_used_gb": ("GiB", "Memory in use on the machine, of all programs."),
    "perf/throughput": ("tokens/s", "Tokens of prompts and answers per second and device."),
}
