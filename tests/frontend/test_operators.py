"""Every operator end to end: ONNX Runtime on the ONNX model against the canonical module in a plain TVM build."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from lpsn_tvm.frontend import load_model
from tests.frontend.operator_cases import CASES, LEGACY_CASES, Case
from tests.support.onnx_nets import OnnxNet, canonical, random_feeds, run_module, run_onnx

GROUP = 16  # cases compiled together: one compilation of many small functions is much faster than many compilations


@cache
def results(group: tuple[str, ...], legacy: bool) -> dict[str, tuple[Any, Any]]:
    """Case name -> (ONNX Runtime's output, ours)."""
    cases: dict[str, Case] = LEGACY_CASES if legacy else CASES
    net = OnnxNet()
    x = net.input("x", "N", 8, 9, 7)
    model = net.model(*(cases[name](net, x) for name in group), opset=9 if legacy else 17)
    feeds = random_feeds(load_model(model))
    expected = run_onnx(model, feeds)
    got = run_module(canonical(model), list(feeds.values()))
    return dict(zip(group, zip(expected, got, strict=True), strict=True))


def check(name: str, cases: dict[str, Case], legacy: bool) -> None:
    names = list(cases)
    start = names.index(name) // GROUP * GROUP
    expected, got = results(tuple(names[start : start + GROUP]), legacy)[name]
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", list(CASES))
def test_operator(name: str) -> None:
    check(name, CASES, legacy=False)


@pytest.mark.parametrize("name", list(LEGACY_CASES))
def test_operator_of_opset_9(name: str) -> None:
    check(name, LEGACY_CASES, legacy=True)
