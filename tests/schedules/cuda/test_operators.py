"""Kernels without tensor cores against the reference, bit for bit, in blocked and plain layout, lanes beyond the
channels poisoned; run in the emulation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from cuda_programs import run_kernel

from lpsn_tvm import float_ops, quant
from lpsn_tvm.schedules.cuda import (
    block_reduction,
    convert,
    direct,
    direct_float,
    pooling,
    vectors,
)
from lpsn_tvm.schedules.kernel import Builder, TensorSpec
from lpsn_tvm.schedules.rules import dispatch
from lpsn_tvm.targets.cuda_rules import RULES

REFERENCE: dict[str, Any] = {**quant.OPERATORS, **float_ops.OPERATORS}
RNG = np.random.default_rng(0)
RESULT = {"out_zero_point": 7, "qmin": 0, "qmax": 255, "out_dtype": "uint8"}


def rule(op: str) -> Builder:
    """What lowering for cuda asks for the kernel of an operator."""
    return partial(dispatch, RULES, op)


def u8(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape).astype(np.uint8)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def weights(*shape: int, channels: int, is_float: bool = False) -> dict[str, np.ndarray]:
    if is_float:
        return {"weight": f32(*shape), "bias": f32(channels)}
    return {
        "weight": RNG.integers(-128, 128, shape).astype(np.int8),
        "bias": RNG.integers(-500, 500, channels).astype(np.int32),
        "scale": (RNG.random(channels) * 4e-3).astype(np.float32),
    }


def check(
    builder: Any,
    op: str,
    arrays: Sequence[np.ndarray],
    attrs: Mapping[str, Any],
    constants: Mapping[str, np.ndarray] | None = None,
    block: int = 32,
    tolerance: float | None = None,
) -> None:
    constants = dict(constants or {})
    specs = tuple(TensorSpec(a.shape, str(a.dtype), block if a.ndim >= 2 else 0) for a in arrays)
    kernel = builder(specs, constants, attrs, None)
    assert kernel is not None
    got = run_kernel(kernel, arrays)
    is_layer = op in ("lpsn.conv2d", "lpsn.dense", "lpsn.float_conv2d", "lpsn.float_dense")
    others, residual = ((), arrays[1:]) if is_layer else (arrays[1:], ())
    want = REFERENCE[op](arrays[0], *others, *constants.values(), *residual, **attrs)
    assert got.dtype == want.dtype
    if tolerance is None:
        np.testing.assert_array_equal(got, want)
        assert np.unique(want).size > 1, "the check would not notice an error"
    else:
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


PLAIN = pytest.param(0, marks=pytest.mark.slow)
BLOCKS = pytest.mark.parametrize("block", [PLAIN, 32])
SUM = {"a_multiplier": 0.5, "b_multiplier": 0.257, "a_zero_point": 3, "b_zero_point": 4, **RESULT}


@pytest.fixture(params=[False, True], ids=["few", "many"])
def is_large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Kernels as they are for many elements, if true."""
    if request.param:
        monkeypatch.setattr(vectors, "MANY_ELEMENTS", 1)
        monkeypatch.setattr(pooling, "MANY", 1)
    return bool(request.param)


@BLOCKS
@pytest.mark.parametrize("second", [(2, 40, 3, 5), (1, 1, 3, 5)], ids=str)
def test_add_and_multiply(second: tuple[int, ...], block: int, is_large: bool) -> None:
    check(rule("lpsn.add"), "lpsn.add", [u8(2, 40, 3, 5), u8(*second)], SUM, block=block)
    product = {"multiplier": 0.003, "a_zero_point": 3, "b_zero_point": 4, **RESULT}
    check(rule("lpsn.multiply"), "lpsn.multiply", [u8(2, 40, 3, 5), u8(*second)], product, block=block)


@pytest.mark.parametrize("channels", [3, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 4, 5, 40))])
def test_edges_of_the_network(channels: int) -> None:
    attrs = {"inv_scale": 40.0, "zero_point": 100, "qmin": 0, "qmax": 255, "out_dtype": "uint8"}
    check(convert.quantize, "lpsn.quantize", [f32(2, channels, 3, 5)], attrs, block=0)
    x = u8(2, channels, 3, 5)
    check(convert.dequantize, "lpsn.dequantize", [x], {"scale": 0.1, "zero_point": 4})
    spec = TensorSpec(x.shape, "uint8", 32)
    for block in (0, 4, 16):
        np.testing.assert_array_equal(run_kernel(convert.relayout(spec, spec.with_block(block)), [x]), x)
        np.testing.assert_array_equal(run_kernel(convert.relayout(spec.with_block(block), spec), [x]), x)


@BLOCKS
def test_requantize_and_lookup(block: int, is_large: bool) -> None:
    x = u8(1, 40, 3, 5)
    check(
        rule("lpsn.requantize"), "lpsn.requantize", [x], {"multiplier": 0.7, "in_zero_point": 9, **RESULT}, block=block
    )
    check(rule("lpsn.lookup"), "lpsn.lookup", [x], {"qmin": 0}, {"table": u8(256)}, block=block)
    check(rule("lpsn.lookup"), "lpsn.lookup", [x.view(np.int8)], {"qmin": -128}, {"table": u8(256)}, block=block)
    check(rule("lpsn.channel_lookup"), "lpsn.channel_lookup", [x], {"qmin": 0}, {"table": u8(40, 256)}, block=block)


@BLOCKS
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_pooling(ceil_mode: bool, block: int) -> None:
    window = {"kernel": (3, 2), "strides": (2, 1), "padding": (1, 0, 0, 1), "ceil_mode": ceil_mode}
    x = u8(2, 40, 8, 7)
    check(rule("lpsn.max_pool2d"), "lpsn.max_pool2d", [x], window, block=block)
    average = {"in_zero_point": 5, "multiplier": 0.9, **RESULT}
    for counted in (False, True):
        check(
            rule("lpsn.avg_pool2d"),
            "lpsn.avg_pool2d",
            [x],
            window | average | {"count_include_pad": counted},
            block=block,
        )


WINDOWS = {
    "3x3 stride 2": {"kernel": (3, 3), "strides": (2, 2), "padding": (1, 1, 1, 1)},
    "5x5": {"kernel": (5, 5), "strides": (1, 1), "padding": (2, 2, 2, 2)},
    "rows in a loop": {"kernel": (13, 9), "strides": (1, 1), "padding": (6, 4, 6, 4)},
    "apart": {"kernel": (1, 2), "strides": (2, 3), "padding": (0, 0, 0, 0)},
    "larger than sums": {"kernel": (17, 17), "strides": (1, 1), "padding": (8, 8, 8, 8)},
}


@pytest.mark.parametrize("dtype", ["uint8", pytest.param("int8", marks=pytest.mark.slow), "float32"])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_windows_that_overlap(window: dict[str, tuple[int, ...]], dtype: str, is_large: bool) -> None:
    # Channels of different height, so that large windows have different maxima.
    bytes_ = (u8(1, 40, 7, 11) % RNG.integers(1, 256, (1, 40, 1, 1))).astype(np.uint8)
    x = f32(1, 40, 7, 11) if dtype == "float32" else bytes_.view(dtype)
    if dtype == "float32":
        check(rule("lpsn.float_max_pool2d"), "lpsn.float_max_pool2d", [x], window)
        check(rule("lpsn.float_avg_pool2d"), "lpsn.float_avg_pool2d", [x], window, tolerance=1e-5)
        return
    check(rule("lpsn.max_pool2d"), "lpsn.max_pool2d", [x], window)
    average = {"in_zero_point": 5, "multiplier": 3.1, **RESULT}
    check(rule("lpsn.avg_pool2d"), "lpsn.avg_pool2d", [x], window | average)


def test_dilated_maximum(is_large: bool) -> None:
    window = {"kernel": (3, 3), "strides": (1, 1), "padding": (2, 2, 2, 2), "dilation": (2, 2)}
    check(rule("lpsn.max_pool2d"), "lpsn.max_pool2d", [u8(1, 40, 7, 11)], window)


@pytest.mark.parametrize("block", [PLAIN, pytest.param(4, marks=pytest.mark.slow), 32])
@pytest.mark.parametrize("size", [(1, 1), (20, 31)], ids=str)
def test_global_average(size: tuple[int, int], block: int) -> None:
    attrs = {"in_zero_point": 5, "multiplier": 0.9 / (size[0] * size[1]), **RESULT}
    check(rule("lpsn.global_avg_pool2d"), "lpsn.global_avg_pool2d", [u8(2, 40, *size)], attrs, block=block)
    check(
        rule("lpsn.float_global_avg_pool2d"),
        "lpsn.float_global_avg_pool2d",
        [f32(2, 40, *size)],
        {},
        block=block,
        tolerance=1e-5,
    )


@BLOCKS
def test_resize_and_pad(block: int) -> None:
    x = u8(1, 40, 4, 5)
    nearest = {"rows": (0, 0, 1, 3, 3), "columns": (4, 2, 0)}
    check(rule("lpsn.resize_nearest"), "lpsn.resize_nearest", [x], nearest, block=block)
    linear = {
        "rows": (0, 1, 2, 3),
        "row_weights": (100, 28, 64, 64),
        "columns": (0, 1, 2, 3, 3, 4),
        "column_weights": (1, 127, 64, 64, 128, 0),
        "qmin": 10,
        "qmax": 200,
    }
    check(rule("lpsn.resize_linear"), "lpsn.resize_linear", [x], linear, block=block)
    check(rule("lpsn.pad"), "lpsn.pad", [x], {"pad_width": (1, 2, 0, 1), "value": 9, "mode": "constant"}, block=block)
    check(rule("lpsn.pad"), "lpsn.pad", [x], {"pad_width": (1, 2, 0, 1), "value": 0, "mode": "reflect"}, block=block)


@BLOCKS
@pytest.mark.parametrize("cut", [(16, 40, 1), (4, 40, 1), (35, 2, -3)], ids=str)
def test_slice(cut: tuple[int, int, int], block: int) -> None:
    attrs = {"axes": (1, 2), "begin": (cut[0], 1), "end": (cut[1], 6), "strides": (cut[2], 2)}
    check(rule("lpsn.strided_slice"), "lpsn.strided_slice", [u8(1, 40, 7, 3)], attrs, block=block)


@BLOCKS
def test_rearranging(block: int) -> None:
    for mode in ("DCR", "CRD"):
        for channels in (128, 36):
            attrs = {"block_size": 2, "mode": mode}
            check(rule("lpsn.depth_to_space"), "lpsn.depth_to_space", [u8(1, channels, 3, 4)], attrs, block=block)
    check(rule("lpsn.transpose"), "lpsn.transpose", [u8(1, 40, 3, 4)], {"axes": (0, 2, 3, 1)}, block=block)
    check(rule("lpsn.reshape"), "lpsn.reshape", [u8(1, 40, 3, 4)], {"shape": (1, 480)}, block=block)


@BLOCKS
@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("channels", [(48, 48), (48, 4), (28, 8), (5, 30)], ids=str)
def test_concat(channels: tuple[int, int], axis: int, block: int) -> None:
    first = channels[0]
    arrays = [u8(1, first, 3, 4), u8(1, channels[1] if axis == 1 else first, 3 if axis == 1 else 2, 4)]
    attrs = {"axis": axis, "multipliers": (1.0, 0.5), "zero_points": (7, 3), **RESULT}
    check(rule("lpsn.concat"), "lpsn.concat", arrays, attrs, block=block)


@pytest.mark.parametrize("shape", [(2, 40, 3, 5), (2, 40, 1, 1), (1, 1, 3, 5)], ids=str)
def test_chain_of_float_operations(shape: tuple[int, ...], is_large: bool) -> None:
    attrs = {"program": float_ops.encode_program([["multiply", 0, 1], ["sigmoid", 2], ["add", 3, 0]])}
    arrays = [f32(2, 40, 3, 5), f32(*shape)]
    check(rule("lpsn.float_elementwise"), "lpsn.float_elementwise", arrays, attrs, tolerance=1e-5)


LAYER = {"strides": (1, 1), "padding": (1, 1, 1, 1), "x_zero_point": 11, **RESULT}


@BLOCKS
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("channels", [pytest.param(2, marks=pytest.mark.slow), 48])
def test_depthwise(channels: int, kernel: int, stride: int, block: int) -> None:
    attrs = LAYER | {"strides": (stride, stride), "padding": (kernel // 2,) * 4, "groups": channels}
    constants = weights(channels, 1, kernel, kernel, channels=channels)
    check(direct.depthwise, "lpsn.conv2d", [u8(2, channels, 7, 9)], attrs, constants, block=block)


def test_depthwise_with_residual() -> None:
    attrs = LAYER | {"groups": 48, "residual_multiplier": 0.3, "residual_zero_point": 5}
    check(direct.depthwise, "lpsn.conv2d", [u8(1, 48, 7, 9), u8(1, 48, 7, 9)], attrs, weights(48, 1, 3, 3, channels=48))


@BLOCKS
@pytest.mark.parametrize("groups", [1, 3])
def test_any_convolution(groups: int, block: int) -> None:
    x, constants = u8(1, 12, 6, 7), weights(15, 12 // groups, 3, 2, channels=15)
    attrs = LAYER | {"groups": groups, "dilation": (2, 1)}
    check(direct.conv2d, "lpsn.conv2d", [x], attrs, constants, block=block)
    check(direct.conv2d, "lpsn.conv2d", [x], attrs | {"out_dtype": "float32"}, constants, block=block)
    size = quant.conv2d(x, **constants, **attrs).shape
    residual = {"residual_multiplier": 0.3, "residual_zero_point": 5}
    check(direct.conv2d, "lpsn.conv2d", [x, u8(*size)], attrs | residual, constants, block=block)


@BLOCKS
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("is_float", [False, True])
def test_transposed_convolution(is_float: bool, groups: int, block: int) -> None:
    shape = {"strides": (2, 3), "padding": (1, 0, 2, 1), "output_padding": (1, 0), "dilation": (1, 2), "groups": groups}
    constants = weights(12, 5, 4, 3, channels=5 * groups, is_float=is_float)
    if is_float:
        builder, op = direct_float.float_conv2d_transpose, "lpsn.float_conv2d_transpose"
        check(builder, op, [f32(1, 12, 5, 4)], shape | {"low": 0.0}, constants, block=block, tolerance=1e-4)
    else:
        attrs = shape | {"x_zero_point": 11, **RESULT}
        check(direct.conv2d_transpose, "lpsn.conv2d_transpose", [u8(1, 12, 5, 4)], attrs, constants, block=block)


@BLOCKS
def test_dense(block: int) -> None:
    constants = weights(70, 10, channels=10)
    check(direct.dense, "lpsn.dense", [u8(3, 70)], {"x_zero_point": 11, **RESULT}, constants, block=block)
    floats = weights(70, 10, channels=10, is_float=True)
    arrays = [f32(3, 70), f32(3, 10)]
    check(direct_float.float_dense, "lpsn.float_dense", arrays, {"high": 1.0}, floats, block=block, tolerance=1e-4)


def test_float_layers() -> None:
    attrs = {"strides": (2, 1), "padding": (1, 1, 1, 1), "groups": 3, "low": 0.0}
    constants = weights(6, 4, 3, 3, channels=6, is_float=True)
    check(direct_float.float_conv2d, "lpsn.float_conv2d", [f32(2, 12, 7, 9)], attrs, constants, block=0, tolerance=1e-4)


@pytest.mark.parametrize(("shape", "axis"), [((3, 300), 1), ((3, 30, 5), 1), ((2, 3), -1)], ids=str)
def test_softmax(shape: tuple[int, ...], axis: int) -> None:
    arrays = [f32(*shape)]
    check(block_reduction.float_softmax, "lpsn.float_softmax", arrays, {"axis": axis}, block=0, tolerance=1e-5)


@BLOCKS
def test_instance_norm(block: int) -> None:
    constants = {"scale": RNG.random(5).astype(np.float32), "shift": f32(5)}
    arrays, attrs = [f32(2, 5, 7, 9) + np.float32(30)], {"epsilon": 1e-5}
    check(block_reduction.float_instance_norm, "lpsn.float_instance_norm", arrays, attrs, constants, block=block)


def test_results_do_not_depend_on_the_order_of_threads() -> None:
    x = u8(1, 40, 9, 9)
    spec = TensorSpec(x.shape, "uint8", 32)
    attrs = {"in_zero_point": 5, "multiplier": 0.9 / 81, **RESULT}
    kernel = rule("lpsn.global_avg_pool2d")((spec,), {}, attrs, None)
    for order in ("forward", "reversed", "random"):
        np.testing.assert_array_equal(run_kernel(kernel, [x], order=order), quant.global_avg_pool2d(x, **attrs))
