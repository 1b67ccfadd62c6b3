# SPDX-License-Identifier: Apache-2.0
"""The draws against scipy's distributions, and against hashlib written out."""

import hashlib
import struct

import numpy as np
import pytest
from scipy import stats

from verl_dvpo.noise.draws import normal, student_t, symmetric_stable, uniforms

DRAWS = np.array([uniforms(7, ("sample", number)) for number in range(4000)])
# of 12 fixed comparisons none is as far off as one in 10,000
LEAST_P = 1e-4


def test_uniforms_are_the_hash_of_their_key_written_out():
    # each part: its length in 8 little-endian bytes, then its text; then 8 words, of which the top 52 bits count
    message = b"".join(struct.pack("<Q", len(part)) + part for part in (b"7", b"sample", b"12"))
    words = struct.unpack("<8Q", hashlib.blake2b(message, person=b"verl_dvpo.noise").digest())
    assert uniforms(7, ("sample", 12)) == tuple((word // 4096 + 0.5) / 2**52 for word in words)


def test_uniforms_are_uniform_and_independent_of_each_other():
    for column in DRAWS.T:
        assert stats.kstest(column, "uniform").pvalue > LEAST_P
    correlation = np.corrcoef(DRAWS.T) - np.eye(DRAWS.shape[1])
    assert np.abs(correlation).max() < 4.5 / np.sqrt(len(DRAWS))


def test_keys_differ_by_every_part_and_by_where_parts_end():
    keys = [(0, ("ab", "c")), (0, ("a", "bc")), (0, ("abc",)), (1, ("ab", "c")), (0, ("ab", "c", 0)), (0, ("ab", ""))]
    assert len({uniforms(seed, parts) for seed, parts in keys}) == len(keys)


def test_normal_numbers():
    assert stats.kstest([normal(u) for u in DRAWS[:, 0]], "norm").pvalue > LEAST_P
    assert normal(0.718) == pytest.approx(stats.norm.ppf(0.718), rel=1e-12)


@pytest.mark.parametrize("degrees", [0.5, 1.0, 1.5, 3.0, 100.0])
def test_student_t_numbers(degrees: float):
    drawn = [student_t(u, v, degrees) for u, v in DRAWS[:, :2]]
    assert stats.kstest(drawn, stats.t(degrees).cdf).pvalue > LEAST_P


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5, 2.0])
def test_symmetric_stable_numbers(alpha: float):
    drawn = np.array([symmetric_stable(u, v, alpha) for u, v in DRAWS[:, :2]])
    # the definition: E cos(t X) = exp(-|t|^alpha), and E sin(t X) = 0
    for t in (0.3, 1.0, 2.0):
        tolerance = 4.0 / np.sqrt(len(drawn))
        assert np.cos(t * drawn).mean() == pytest.approx(np.exp(-(t**alpha)), abs=tolerance)
        assert np.sin(t * drawn).mean() == pytest.approx(0.0, abs=tolerance)
    if alpha in (1.0, 2.0):
        known = {1.0: stats.cauchy, 2.0: stats.norm(scale=np.sqrt(2.0))}[alpha]
        assert stats.kstest(drawn, known.cdf).pvalue > LEAST_P
