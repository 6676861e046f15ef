"""Random networks: every integer region within one step of float arithmetic, ONNX Runtime on the exported models."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import models
from small_graphs import check_regions, random_feed, simple_plan

from lpsn_tvm.export import to_onnx
from lpsn_tvm.frontend import import_model, load_model
from lpsn_tvm.passes.canonicalize import canonicalize
from lpsn_tvm.passes.lower_to_integer import lower_to_integer
from lpsn_tvm.reference import run_reference

CHECKS = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
NETWORKS = {
    "model": models(),
    "weight_bits": st.integers(2, 8),
    "activation_bits": st.integers(2, 8),
    "signed": st.booleans(),
    "seed": st.integers(0, 99),
}


def check(model: Any, weight_bits: int, activation_bits: int, signed: bool, seed: int) -> None:
    mod = canonicalize(import_model(load_model(model)).mod)
    plan = simple_plan(mod, weight_bits, activation_bits, signed)
    lowered = lower_to_integer(mod, plan)
    feeds = random_feed(mod, seed)
    check_regions(mod, plan, lowered, feeds)
    want = run_reference(lowered, feeds)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    for exported, expected, share in (
        (to_onnx(mod), run_reference(mod, feeds), 1e-4),
        (to_onnx(mod, plan=plan), want, 0.1),
    ):
        session = onnxruntime.InferenceSession(
            exported.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        for got, value in zip(session.run(None, feeds), expected.values(), strict=True):
            # On the quantized grid a value at a rounding boundary may fall to either side; at two bits that shows.
            assert np.mean(np.abs(got - value)) <= share * max(float(np.ptp(value)), 1e-3)


@settings(max_examples=25, **CHECKS)
@given(**NETWORKS)
def test_lowering_and_export_agree_with_float_arithmetic(**case: Any) -> None:
    check(**case)


@pytest.mark.slow
@settings(max_examples=400, **CHECKS)
@given(**NETWORKS)
def test_lowering_and_export_agree_on_many_networks(**case: Any) -> None:
    check(**case)
