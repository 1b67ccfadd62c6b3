# SPDX-License-Identifier: Apache-2.0
"""Draws random numbers from a keyed hash: without state, so equal in every process and order."""

import hashlib
import math
from collections.abc import Iterable
from statistics import NormalDist

#: Uniform numbers per key: one blake2b digest of 64 bytes.
COUNT = 8
_NORMAL = NormalDist()


def uniforms(seed: int, parts: Iterable[str | int]) -> tuple[float, ...]:
    """Returns ``COUNT`` numbers in the open interval (0, 1), independent for different keys.

    Args:
        seed: integer >= 0.
        parts: the key. Each part is hashed with its length before it, so that ("ab", "c") differs from ("a", "bc").
    """
    digest = hashlib.blake2b(digest_size=8 * COUNT, person=b"verl_dvpo.noise")
    for part in (seed, *parts):
        data = str(part).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    raw = digest.digest()
    words = (int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8))
    # 52 bits, and half a step: 0 and 1 have no logarithm or quantile.
    return tuple(((word >> 12) + 0.5) * 2.0**-52 for word in words)


def normal(u: float) -> float:
    """Returns the standard normal quantile of u in (0, 1)."""
    return _NORMAL.inv_cdf(u)


def normal_cdf(x: float) -> float:
    """Returns the probability in [0, 1] that a standard normal number is below x."""
    return _NORMAL.cdf(x)


def student_t(u: float, v: float, degrees: float) -> float:
    """Returns a Student-t number with ``degrees`` > 0 of freedom from two uniform numbers u and v in (0, 1).

    It is sqrt(d (u^(-2/d) - 1)) cos(2 pi v) with d = ``degrees``: the polar method of Bailey (Mathematics of
    Computation 62, 1994; paper).
    """
    return math.sqrt(degrees * math.expm1(-2.0 / degrees * math.log(u))) * math.cos(2.0 * math.pi * v)


def symmetric_stable(u: float, v: float, alpha: float) -> float:
    """Returns a number with characteristic function exp(-|t|^alpha), alpha in (0, 2], from two uniform numbers.

    The symmetric case of Chambers, Mallows and Stuck (JASA 71, 1976; paper): variance 2 at alpha = 2, Cauchy at
    alpha = 1.
    """
    angle = math.pi * (u - 0.5)
    waiting = -math.log(v)
    if alpha == 1.0:
        return math.tan(angle)
    return (
        math.sin(alpha * angle)
        / math.cos(angle) ** (1.0 / alpha)
        * (math.cos((1.0 - alpha) * angle) / waiting) ** ((1.0 - alpha) / alpha)
    )
