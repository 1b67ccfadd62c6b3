# SPDX-License-Identifier: Apache-2.0
"""Settings of each kind of noise, one model a kind.

A ``Binary`` kind is for rewards with a wrong end ``low`` and a right end ``high``. A score above the middle of
[low, high] counts as right; the opposite verdict on a score is its mirror image ``low + high - score``.
"""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from verl_dvpo.noise.base import PREFIX, Amount, Name, NameOrNull, NoiseConfig, Number, Pattern, Scope, Share, Switch

STABLE, STUDENT_T = "stable", "student_t"
#: Below the lowest ``tail``, single draws leave the range of the fp32 in which verl stores rewards.
TAILS = {STUDENT_T: (0.5, 100.0), STABLE: (0.5, 2.0)}


class Binary(NoiseConfig):
    """Corrupts rewards that have two ends; a clean score outside [low, high] is an error."""


class Flip(Binary):
    """Mirrors the score with probability ``rate``, right or wrong alike (symmetric label flip)."""

    rate: Share
    scope: Scope = "sample"


class FlipAsymmetric(Binary):
    """Passes wrong responses with probability ``false_positive``, fails right ones with ``false_negative``."""

    false_positive: Share
    false_negative: Share
    scope: Scope = "sample"


class Additive(NoiseConfig):
    """Adds something to a share ``rate`` of the scores."""

    rate: Share = 1.0
    scope: Scope = "sample"


class Gaussian(Additive):
    """Adds a normal number with mean 0 and standard deviation ``scale`` >= 0, in units of reward."""

    scale: Amount


class HeavyTailed(Additive):
    """Adds ``scale`` times a standard heavy-tailed number, symmetric about 0.

    Attributes:
        family: ``student_t`` or ``stable`` (symmetric alpha-stable; characteristic function exp(-|t|^alpha)).
        tail: P(|x| > u) falls as u^-tail. Degrees of freedom in [0.5, 100] of student_t, alpha in [0.5, 2] of stable.
            No variance at or below 2 (stable: below 2), no mean at or below 1.
        scale: >= 0, in units of reward.
        rate_elsewhere: share in [0, 1] of the samples that ``where`` leaves out and that get it all the same.
    """

    family: Annotated[Literal["student_t", "stable"], Field(description="one of 'student_t' and 'stable'")]
    tail: Number
    scale: Amount
    rate_elsewhere: Share = 0.0

    @field_validator("tail")
    @classmethod
    def _of_family(cls, tail: float, info: ValidationInfo) -> float:
        family = info.data.get("family")
        if family is not None and not TAILS[family][0] <= tail <= TAILS[family][1]:
            low, high = TAILS[family]
            raise ValueError(f"it must be a number in [{low:g}, {high:g}] with {PREFIX}.family={family}")
        return tail


class PreferenceModel(HeavyTailed):
    """Scores as a reward model learnt from comparisons: with an offset of each prompt, and heavy-tailed errors on some.

    Comparisons are made between answers to one prompt, so they fix a score only up to a function of the prompt
    (Bradley and Terry, Biometrika 39, 1952; ours as a noise). Advantages against the true value of a state are free of
    the offset; one bound for the rewards of a whole batch is not.

    Attributes:
        offset: standard deviation >= 0, in units of reward, of the normal number that prompts with one match share.
        offset_pattern: regular expression, searched in the prompt's last user message; prompts with the same match
            share an offset. null: each prompt has its own.
    """

    offset: Amount
    offset_pattern: Pattern = None


class Inflation(Additive):
    """Adds ``amount`` >= 0, in units of reward."""

    amount: Amount


class Deflation(Inflation):
    """Subtracts ``amount`` >= 0, in units of reward."""


class LengthBias(Additive):
    """Adds ``slope`` (any sign, in units of reward) times the response's length over ``reference``, both in tokens."""

    slope: Number
    reference: Annotated[int, Field(ge=1, description="an integer of at least 1")]


class PromptConsistent(Binary):
    """Gives a share ``rate`` of the prompts a wrong reference answer for the whole run, as a wrong majority vote does.

    On such a prompt a right response fails, and a wrong one passes if it agrees with the wrong reference.

    Attributes:
        rate: share of the prompts.
        agreement: share in [0, 1] of the wrong answers to such a prompt that count as agreeing. An answer is what the
            reward function returns under ``answer_key``, or else the whole response; the same answer to the same
            prompt is always judged alike.
        answer_key: key in the wrapped reward's dict that holds the extracted answer, as verl's own rewards do.
        wrong_answer_key: key in the sample's ``extra_info`` with the wrong reference itself, where the data has it;
            a wrong response then passes if its answer equals that exactly, and ``agreement`` is not used.
    """

    rate: Share
    agreement: Share = 0.5
    answer_key: Name = "pred"
    wrong_answer_key: NameOrNull = None


class RewardModel(Binary):
    """Replaces the verdict by a learnt judge's.

    The judge's latent score is normal around +m for right and -m for wrong responses, m = Φ^-1(accuracy).

    Attributes:
        accuracy: share in [0, 1] of its verdicts that are right (paper: 0.718).
        graded: true: low + (high - low) * logistic(2 |m| z) of the latent score z, for m > 0 the probability of
            ``right`` given z at even odds; false: ``high`` where z > 0 and ``low`` elsewhere.
        scope: a real judge gives the same score to the same response, so ``response``.
    """

    accuracy: Share
    graded: Switch = True
    scope: Scope = "response"


class Dropout(NoiseConfig):
    """Withholds the reward with probability ``rate``: the score becomes ``withheld``, in units of reward."""

    rate: Share
    withheld: Number = 0.0
    scope: Scope = "sample"


class Adversary(Binary):
    """Flips up to a share ``rate`` of the verdicts on each prompt, the rarer verdict first.

    It sees one sample at a time: the clean verdict, and how often the prompt is expected to be solved, p. Flipping a
    share f of right and g of wrong responses leaves a gap of (1 - f - g) (high - low) between what right and wrong
    responses earn on average, and costs p f + (1 - p) g of the budget. The gap shrinks most per unit of budget on the
    rarer verdict: right answers to hard prompts fail, wrong answers to easy prompts pass. What is left goes to the
    other verdict. It cannot see the other samples, so the budget holds where p does; the share that it spent is
    logged.

    Attributes:
        rate: budget, the share of the responses to each prompt.
        pass_rate: p in [0, 1] where the data does not say. At 1/2 it takes the right responses first.
        pass_rate_key: key in the sample's ``extra_info`` with the prompt's own p; null uses ``pass_rate`` for all.
    """

    rate: Share
    pass_rate: Share = 0.5
    pass_rate_key: NameOrNull = None


KINDS: dict[str, type[NoiseConfig]] = {
    "flip": Flip,
    "flip_asymmetric": FlipAsymmetric,
    "gaussian": Gaussian,
    "heavy_tailed": HeavyTailed,
    "preference_model": PreferenceModel,
    "inflation": Inflation,
    "deflation": Deflation,
    "length_bias": LengthBias,
    "prompt_consistent": PromptConsistent,
    "reward_model": RewardModel,
    "dropout": Dropout,
    "adversary": Adversary,
}
#: Clean rewards: nothing of verl's is touched.
NONE = "none"
