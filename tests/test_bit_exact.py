"""Compiled integer modules equal `quant.py` bit for bit: every operator, every instruction set, whole random networks.

Operators get inputs over the whole range of their container and scales that produce exact ties and saturation, so that
rounding and clamping count.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from integer_operators import FAMILIES, Operators
from random_graphs import BLOCKS, models
from small_graphs import random_feed, simple_plan

from lpsn_tvm import graph
from lpsn_tvm.frontend import import_model, load_model
from lpsn_tvm.passes.canonicalize import canonicalize
from lpsn_tvm.passes.fuse_float import fuse_float
from lpsn_tvm.passes.lower_to_integer import lower_to_integer
from lpsn_tvm.reference import run_reference
from lpsn_tvm.targets.backend import get_backend
from lpsn_tvm.targets.compile import load

# This machine; AVX2 without VNNI; no vector extension beyond SSE2.
TARGETS = ("llvm", "llvm -mcpu=haswell", pytest.param("llvm -mcpu=x86-64", marks=pytest.mark.slow))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_operators_equal_the_reference(family: str, target: str) -> None:
    operators = Operators()
    FAMILIES[family](operators)
    mod = operators.module()
    want = run_reference(mod, operators.feeds)
    got = load(get_backend(target).compile(mod))(list(operators.feeds.values()))
    for (name, value), result in zip(want.items(), got, strict=True):
        np.testing.assert_array_equal(np.asarray(result), value, err_msg=name)
        assert np.unique(value).size > 1, f"{name}: the check would not notice an error"


def check_network(model: Any, bits: int, seed: int) -> None:
    mod = canonicalize(import_model(load_model(model)).mod)
    lowered = fuse_float(lower_to_integer(mod, simple_plan(mod, bits, bits)))
    feeds = random_feed(mod, seed)
    want = list(run_reference(lowered, feeds).values())
    got = load(get_backend("llvm").compile(lowered))(list(feeds.values()))
    has_float = any(graph.is_inexact(value) for _, value in graph.bindings(lowered))
    for result, value in zip(got, want, strict=True):
        if has_float:
            # A boundary may be crossed where a float operator rounded otherwise; at few bits that spreads.
            assert np.mean(np.abs(np.asarray(result) - value)) < 0.1 * max(float(np.ptp(value)), 1e-3)
        else:
            np.testing.assert_array_equal(np.asarray(result), value)


NETWORKS = {
    "model": models(blocks=[block for block in BLOCKS if block != "instance_norm"], max_blocks=4),
    "bits": st.sampled_from([8, 4, 3]),
    "seed": st.integers(0, 99),
}
CHECKS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=6, **CHECKS)
@given(**NETWORKS)
def test_random_networks_equal_the_reference(model: Any, bits: int, seed: int) -> None:
    check_network(model, bits, seed)


@pytest.mark.slow
@settings(max_examples=100, **CHECKS)
@given(**NETWORKS)
def test_many_random_networks_equal_the_reference(model: Any, bits: int, seed: int) -> None:
    check_network(model, bits, seed)
