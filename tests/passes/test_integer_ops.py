from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from lpsn_tvm import graph, quant
from lpsn_tvm.errors import QuantizeError
from lpsn_tvm.passes.integer_ops import attribute_defaults, integer_call, result_attrs
from lpsn_tvm.quant import QuantParams

SCALED = {"out_zero_point": 3, "qmin": 0, "qmax": 255, "out_dtype": "uint8"}
POOL = {"kernel": (3, 2), "strides": (2, 2), "padding": (1, 0, 0, 1)}
AVERAGE = {"in_zero_point": 2, "multiplier": 0.5, **SCALED}


def u8(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def s8(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(-128, 128, shape).astype(np.int8)


def layer(weight: np.ndarray, channels: int) -> list[np.ndarray]:
    return [weight, np.arange(channels, dtype=np.int32), np.full(channels, 1e-3, np.float32)]


CASES = {
    "quantize": (
        [np.ones((1, 2, 3), np.float32)],
        {"inv_scale": 2.0, "zero_point": 1, "qmin": 0, "qmax": 15, "out_dtype": "uint8"},
    ),
    "dequantize": ([u8(1, 2, 3)], {"scale": 0.5, "zero_point": 3}),
    "requantize": ([u8(1, 2, 3)], {"multiplier": 0.5, "in_zero_point": 3, **SCALED}),
    "conv2d": (
        [u8(2, 4, 9, 8), *layer(s8(6, 2, 3, 2), 6)],
        {"strides": (2, 1), "padding": (1, 0, 0, 1), "dilation": (2, 1), "groups": 2, "x_zero_point": 5, **SCALED},
    ),
    "conv2d_transpose": (
        [u8(1, 4, 5, 6), *layer(s8(4, 3, 3, 3), 6)],
        {"strides": (2, 2), "padding": (1, 1, 0, 1), "output_padding": (1, 0), "groups": 2, **SCALED},
    ),
    "dense": ([u8(2, 8), *layer(s8(8, 5), 5)], SCALED),
    "add": (
        [u8(1, 4, 3, 3), u8(1, 4, 1, 1)],
        {"a_multiplier": 0.5, "b_multiplier": 0.25, "a_zero_point": 1, "b_zero_point": 2, **SCALED},
    ),
    "multiply": (
        [u8(1, 4, 3, 3), u8(1, 4, 1, 1)],
        {"multiplier": 0.01, "a_zero_point": 1, "b_zero_point": 2, **SCALED},
    ),
    "lookup": ([u8(1, 4, 3, 3), s8(256)], {"qmin": 0}),
    "channel_lookup": ([u8(1, 4, 3, 3), u8(4, 256)], {"qmin": 0}),
    "concat": (
        [u8(1, 4, 3, 3), u8(1, 2, 3, 3)],
        {"axis": 1, "multipliers": (1.0, 0.5), "zero_points": (3, 4), **SCALED},
    ),
    "max_pool2d": ([u8(1, 4, 8, 7)], {**POOL, "ceil_mode": True}),
    "avg_pool2d": ([u8(1, 4, 8, 7)], {**POOL, **AVERAGE, "ceil_mode": True}),
    "global_avg_pool2d": ([u8(1, 4, 8, 7)], AVERAGE),
    "resize_nearest": ([u8(1, 4, 2, 2)], {"rows": (0, 0, 1), "columns": (0, 1)}),
    "resize_linear": (
        [u8(1, 4, 2, 2)],
        {
            "rows": (0, 1, 0, 1),
            "row_weights": (128, 0, 64, 64),
            "columns": (0, 1),
            "column_weights": (3, 125),
            "qmin": 0,
            "qmax": 255,
        },
    ),
    "pad": ([u8(1, 4, 3, 3)], {"pad_width": (1, 2, 0, 1), "value": 7}),
    "strided_slice": ([u8(1, 4, 6, 6)], {"axes": (1, 3), "begin": (1, 5), "end": (4, -1), "strides": (2, -2)}),
    "depth_to_space": ([u8(1, 8, 3, 3)], {"block_size": 2, "mode": "CRD"}),
    "reshape": ([u8(1, 8, 3, 3)], {"shape": (1, 72)}),
    "transpose": ([u8(1, 8, 3, 2)], {"axes": (0, 3, 1, 2)}),
}


def as_vars(arrays: list[np.ndarray]) -> list[relax.Var]:
    return [relax.Var(f"x{i}", relax.TensorType(a.shape, str(a.dtype))) for i, a in enumerate(arrays)]


def test_every_operator_is_covered() -> None:
    assert {f"lpsn.{name}" for name in CASES} == set(quant.OPERATORS)


@pytest.mark.parametrize("name", CASES)
def test_inferred_type_is_the_reference_result(name: str) -> None:
    arrays, attrs = CASES[name]
    call = integer_call(f"lpsn.{name}", as_vars(arrays), attrs)
    result = quant.OPERATORS[f"lpsn.{name}"](*arrays, **graph.call_attrs(call))
    assert graph.op_name(call) == f"lpsn.{name}"
    typed = relax.BlockBuilder().normalize(call)
    assert (graph.shape_of(typed), graph.dtype_of(typed)) == (result.shape, str(result.dtype))


def test_a_call_carries_every_attribute() -> None:
    arrays, attrs = CASES["dense"]
    call = integer_call("lpsn.dense", as_vars(arrays), attrs)
    defaults = attribute_defaults("lpsn.dense")
    assert set(graph.call_attrs(call)) == {name for name, default in defaults.items() if default is not None}
    assert set(defaults) - set(graph.call_attrs(call)) == {"table"}


def test_floats_are_float32_values() -> None:
    call = integer_call("lpsn.dequantize", as_vars([u8(1, 2)]), {"scale": 0.1, "zero_point": 0})
    assert graph.call_attrs(call)["scale"] == float(np.float32(0.1)) != 0.1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dequantize", {"shift": 3}, "unknown attribute shift; known: scale, zero_point"),
        ("dequantize", {"scale": None}, None),
        ("conv2d", {"groups": 3}, "does not fit input"),
        ("concat", {"zero_points": (1,)}, "2 tensors need as many"),
        ("reshape", {"shape": (1, 71)}, "cannot reshape"),
        ("max_pool2d", {"kernel": (30, 30)}, "is empty"),
    ],
)
def test_contradictions_are_errors(name: str, change: dict, message: str | None) -> None:
    arrays, attrs = CASES[name]
    if message is None:
        attrs, change, message = {"zero_point": 0}, {}, "attribute scale is missing"
    with pytest.raises(QuantizeError, match=message):
        integer_call(f"lpsn.{name}", as_vars(arrays), {**attrs, **change})


def test_unknown_operator_and_wrong_result_type_are_errors() -> None:
    with pytest.raises(QuantizeError, match="unknown integer operator"):
        integer_call("lpsn.fft", [], {})
    with pytest.raises(QuantizeError, match="result shape is"):
        integer_call("lpsn.reshape", as_vars([u8(1, 4)]), {"shape": (2, 2)}, out_shape=(4, 1))
    with pytest.raises(QuantizeError, match="result dtype is uint8, not int8"):
        integer_call("lpsn.reshape", as_vars([u8(1, 4)]), {"shape": (2, 2)}, out_dtype="int8")


@pytest.mark.parametrize(
    ("bits", "signed", "zero_point", "interval", "expected"),
    [
        (8, False, 10, (-np.inf, np.inf), (0, 255)),
        (8, False, 10, (0.0, np.inf), (10, 255)),
        (8, False, 10, (0.0, 6.0), (10, 22)),
        (4, False, 2, (-100.0, 100.0), (0, 15)),
        (8, True, 0, (0.0, np.inf), (0, 127)),
        (8, False, 0, (-6.0, -1.0), (0, 0)),
    ],
)
def test_clamps_become_integer_bounds(
    bits: int, signed: bool, zero_point: int, interval: tuple, expected: tuple
) -> None:
    attrs = result_attrs(QuantParams(np.float32(0.5), zero_point, bits, signed), *interval)
    assert (attrs["qmin"], attrs["qmax"]) == expected
