"""What the cuda backend generates, run launch by launch in the emulation, equals the reference bit for bit: every
operator, and random networks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_programs import run_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from integer_operators import FAMILIES, Operators, is_inexact
from random_graphs import BLOCKS, models
from small_graphs import random_feed, simple_plan

from lpsn_tvm import graph
from lpsn_tvm.frontend import import_model, load_model
from lpsn_tvm.passes.canonicalize import canonicalize
from lpsn_tvm.passes.fuse_float import fuse_float
from lpsn_tvm.passes.lower_to_integer import lower_to_integer
from lpsn_tvm.reference import run_reference
from lpsn_tvm.targets.cuda import cuda_backend

SLOW = pytest.mark.slow
ARCHITECTURES = (pytest.param("sm_75", marks=SLOW), "sm_86", pytest.param("sm_90", marks=SLOW))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_operators_equal_the_reference(family: str, arch: str) -> None:
    operators = Operators()
    FAMILIES[family](operators)
    mod = operators.module()
    want = run_reference(mod, operators.feeds)
    got = run_module(cuda_backend({"kind": "cuda", "arch": arch}), mod, operators.feeds)
    for (name, value), result in zip(want.items(), got, strict=True):
        assert result.dtype == value.dtype
        np.testing.assert_array_equal(result, value, err_msg=name)


def check_network(model: Any, bits: int, seed: int, arch: str = "sm_86") -> None:
    mod = canonicalize(import_model(load_model(model)).mod)
    lowered = fuse_float(lower_to_integer(mod, simple_plan(mod, bits, bits)))
    feeds = random_feed(mod, seed)
    want = list(run_reference(lowered, feeds).values())
    got = run_module(cuda_backend({"kind": "cuda", "arch": arch}), lowered, feeds)
    has_float = any(is_inexact(value) for _, value in graph.bindings(lowered))
    for result, value in zip(got, want, strict=True):
        if has_float:
            # A boundary may be crossed where a float operator rounded otherwise; at few bits that spreads.
            assert np.mean(np.abs(result - value)) < 0.1 * max(float(np.ptp(value)), 1e-3)
        else:
            np.testing.assert_array_equal(result, value)


CHECKS: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
NETWORKS = {
    "model": models(blocks=[block for block in BLOCKS if block != "instance_norm"], max_blocks=4),
    "bits": st.sampled_from([8, 4, 3]),
    "seed": st.integers(0, 99),
}


@settings(max_examples=2, **CHECKS)
@given(**NETWORKS)
def test_random_networks_equal_the_reference(model: Any, bits: int, seed: int) -> None:
    check_network(model, bits, seed)


@pytest.mark.slow
@settings(max_examples=40, **CHECKS)
@given(**NETWORKS)
def test_many_random_networks_equal_the_reference(model: Any, bits: int, seed: int) -> None:
    check_network(model, bits, seed)
