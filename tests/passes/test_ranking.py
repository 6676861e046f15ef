import math

import numpy as np
import pytest

from lpsn_tvm.passes.ranking import kendall_tau, levenshtein


@pytest.mark.parametrize(
    "first, second, edits", [("kitten", "sitting", 3), ("", "ab", 2), ("abc", "abc", 0), ("abcd", "dcba", 4)]
)
def test_levenshtein(first, second, edits):
    assert levenshtein(first, second) == edits


def test_kendall_tau_agrees_with_scipy():
    from scipy.stats import kendalltau

    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 8, 30).astype(float), rng.normal(size=30)
    assert kendall_tau(a, b) == pytest.approx(kendalltau(a, b).statistic)
    assert kendall_tau(b, b) == pytest.approx(1.0) and kendall_tau(b, -b) == pytest.approx(-1.0)
    assert math.isnan(kendall_tau(np.ones(3), b[:3]))
