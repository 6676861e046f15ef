"""Random small CNNs through `build`: float against ONNX Runtime, integers against the reference bit for bit."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_graphs import models, random_input, random_model

import lpsn_tvm
from lpsn_tvm import graph
from lpsn_tvm.reference import run_reference
from lpsn_tvm.targets.backend import Backend

Array = npt.NDArray[Any]
MOVES = {
    f"lpsn.float_{name}" for name in "resize_nearest strided_slice depth_to_space reshape transpose concat".split()
}
BITS = (None, (8, 8), (4, 8), (4, 4), (2, 3))
SPARSITIES = (None, 0.3, 0.5, "auto")


def run_onnx(model: onnx.ModelProto, x: Array) -> list[Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"input": x}))


def build(model: onnx.ModelProto, **options: Any) -> tuple[Any, Any]:
    """(module, the Relax function that it was lowered from)."""
    lowered: list[Any] = []
    original = Backend.lower

    def remember(self: Backend, mod: Any, *args: Any) -> Any:
        lowered.append(mod)
        return original(self, mod, *args)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        patch.setattr(Backend, "lower", remember)
        module = lpsn_tvm.build(model.SerializeToString(), measure=False, **options)
    return module, lowered[0]


def outputs_of(result: Any) -> list[Array]:
    return list(result.values()) if isinstance(result, dict) else [result]


def is_exact(mod: Any) -> bool:
    """Whether all arithmetic is in integers: the float operators that are left only move numbers."""
    names = {graph.op_name(value) for _, value in graph.bindings(mod)}
    return not any(name.startswith(("relax.", "lpsn.float_")) for name in names - MOVES)


def assert_close(got: Array, want: Array, tolerance: float) -> None:
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * max(1.0, float(np.abs(want).max())))


def assert_near(got: Array, want: Array, fraction: float) -> None:
    """Mean difference as a fraction of the range: one step more or less spreads through few bits."""
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    assert float(np.abs(got - want).mean()) <= fraction * max(float(np.ptp(want)), 1e-3)


def check(model: onnx.ModelProto, bits: Any, sparsity: Any, has_data: bool, align: int | None) -> None:
    x = random_input(model, seed=5)
    calibration = random_input(model, batch=8, seed=1) if has_data else None
    module, lowered = build(model, bits=bits, sparsity=sparsity, calibration=calibration, align=align)
    got = outputs_of(module(x))
    want = list(run_reference(lowered, {lowered["main"].params[0].name: x}).values())
    exported = run_onnx(module.to_onnx(quantized=False), x)
    if sparsity is None or not has_data:
        for ours, theirs in zip(exported, run_onnx(model, x), strict=True):
            assert_close(ours, theirs, 2e-4)
    for ours, theirs, pruned in zip(got, want, exported, strict=True):
        if bits is None:
            assert_close(ours, theirs, 1e-4)
            assert_close(ours, pruned, 2e-4)
        elif is_exact(lowered):
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert_near(ours, theirs, 0.1)
    if bits is not None:
        for ours, theirs in zip(got, run_onnx(module.to_onnx(), x), strict=True):
            assert_near(ours, theirs, 0.02 if min(bits) == 8 else 0.1)


OPTIONS = {
    "bits": st.sampled_from(BITS),
    "sparsity": st.sampled_from(SPARSITIES),
    "has_data": st.booleans(),
    "align": st.sampled_from((1, None, 4)),
}
CHECKS: dict[str, Any] = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=12, **CHECKS)
@given(model=models(max_blocks=4), **OPTIONS)
def test_random_networks(model: onnx.ModelProto, bits: Any, sparsity: Any, has_data: bool, align: int | None) -> None:
    check(model, bits, sparsity, has_data, align)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 400, 50))
def test_many_seeds(start: int) -> None:
    for seed in range(start, start + 50):
        rng = np.random.default_rng(seed)
        bits, sparsity = BITS[rng.integers(len(BITS))], SPARSITIES[rng.integers(len(SPARSITIES))]
        check(random_model(seed), bits, sparsity, bool(rng.integers(4)), (1, None, 4)[rng.integers(3)])


@pytest.mark.parametrize("bits", [(8, 8), (4, 4)])
def test_pruning_dead_channels_changes_nothing(bits: Any) -> None:
    """Channels without weights go first, and nothing else changes."""
    model = random_model(61)
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor).copy()
        if value.ndim == 4 and value.shape[0] >= 8 and value.shape[1] > 1:
            value[: value.shape[0] // 2] = 0.0
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    x = random_input(model, seed=5)
    module, _ = build(model, bits=bits)
    assert module.report.totals["macs"][1] <= module.report.totals["macs"][0]
    for ours, theirs in zip(run_onnx(module.to_onnx(quantized=False), x), run_onnx(model, x), strict=True):
        assert_close(ours, theirs, 2e-4)
