"""Lowering and compilation of whole modules: dispatch, layouts at the boundaries, shared kernels, lifted constants."""

import shutil

import numpy as np
import pytest
import tvm
from integer_network import Builder, residual_network
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.errors import CompileError
from lpsn_tvm.reference import run_reference
from lpsn_tvm.runtime import set_num_threads
from lpsn_tvm.targets import get_backend
from lpsn_tvm.targets.compile import lift_constants, load


def check(mod, target="llvm", exact=True):
    """Compile, run, compare with the reference; returns the lowered module."""
    backend = get_backend(target)
    lowered = backend.lower(mod)
    feeds = {
        p.name: np.random.default_rng(1).standard_normal(graph.shape_of(p)).astype(np.float32)
        for p in mod["main"].params
    }
    got = load(backend.compile(lowered))(list(feeds.values()))
    for value, want in zip(got, run_reference(mod, feeds).values(), strict=True):
        if exact or want.dtype != np.float32:
            np.testing.assert_array_equal(value, want)
        else:
            np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-6)
    return lowered


def calls(lowered):
    return [value.args[0].name_hint for _, value in graph.bindings(lowered) if graph.op_name(value) == "relax.call_tir"]


def test_residual_network_and_shared_kernels():
    lowered = check(Builder().build(residual_network))
    names = calls(lowered)
    assert names == [
        "quantize",
        "conv2d_int8",
        "depthwise_int8",
        "conv2d_int81",
        "conv2d_int81",
        "conv2d_int82",
        "relayout",
    ]
    assert lowered["main"].ret_ty.shape.values[1] == 5


def test_names_are_kept():
    lowered = get_backend("llvm").lower(Builder().build(residual_network))
    names = [var.name for var, _ in graph.bindings(lowered)]
    assert "block/conv.1" in names and "head" in names


def test_several_outputs_in_plain_layout():
    def body(net):
        q = net.quantize(net.x)
        a = net.conv("a", q, 20)
        return relax.Tuple([a, q, net.emit("f", "lpsn.dequantize", [a], scale=0.1, zero_point=110)])

    check(Builder().build(body))


def test_float_operators_of_relax_stay_and_get_plain_layout():
    def body(net):
        a = net.conv("a", net.quantize(net.x), 20)
        f = net.emit("f", "lpsn.dequantize", [a], scale=0.1, zero_point=110)
        s = graph.emit_named(net.builder, relax.op.sigmoid(f), "s")
        m = graph.emit_named(net.builder, relax.op.mean(s, axis=[2], keepdims=True), "m")
        t = graph.emit_named(net.builder, relax.op.subtract(s, m), "t")
        return net.conv("b", net.quantize(t, "q2"), 8)

    lowered = check(Builder().build(body))
    assert calls(lowered).count("relayout") == 1


def test_flatten_of_one_pixel_is_a_view():
    def body(net):
        a = net.conv("a", net.quantize(net.x), 20, kernel=3, padding=(0, 0, 0, 0))
        r = net.emit("r", "lpsn.reshape", [a], shape=(1, 20))
        weight = [
            net.rng.integers(-128, 128, (20, 7)).astype(np.int8),
            np.zeros(7, np.int32),
            np.full(7, 1e-3, np.float32),
        ]
        return net.emit("fc", "lpsn.dense", [r, *map(graph.constant, weight)], out_dtype="float32", x_zero_point=110)

    lowered = check(Builder((1, 3, 3, 3)).build(body))
    assert calls(lowered) == ["quantize", "conv2d_int8", "dense_int8", "relayout"]


def test_two_threads_give_the_same(monkeypatch):
    def body(net):
        return net.conv("b", net.conv("a", net.quantize(net.x), 64), 64)

    mod = Builder((2, 3, 24, 24)).build(body)
    set_num_threads(2)
    try:
        check(mod)
    finally:
        set_num_threads(1)


def test_operator_without_kernel_is_named():
    backend = get_backend("llvm")
    mod = Builder().build(lambda net: net.quantize(net.x))
    from dataclasses import replace

    with pytest.raises(
        CompileError, match=r"q: no kernel of backend llvm takes lpsn.quantize of float32\[1, 3, 10, 12\]"
    ):
        replace(backend, rules={}).lower(mod)


def test_large_constants_become_the_last_argument():
    mod = get_backend("llvm").lower(
        Builder().build(lambda net: net.conv("b", net.conv("a", net.quantize(net.x), 32), 32))
    )
    lifted, arrays = lift_constants(mod)
    assert [p.name for p in lifted["main"].params] == ["x", "params"]
    assert [array.ndim for array in arrays] == [7, 7], "weights only"
    tvm.ir.assert_structural_equal(mod["main"].ret_ty, lifted["main"].ret_ty)


def test_missing_compiler_is_said(monkeypatch):
    mod = Builder().build(lambda net: net.quantize(net.x))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(CompileError, match="needs a C compiler driver"):
        get_backend("llvm").compile(mod)


def reshaped(net, *shape):
    return net.emit(f"reshaped{len(shape)}", "lpsn.reshape", [net.quantize(net.x)], shape=shape)


QUANTIZED = dict(out_zero_point=3, qmin=0, qmax=255, out_dtype="uint8")
POINTS = dict(a_zero_point=110, b_zero_point=110, **QUANTIZED)
SUM, PRODUCT = dict(a_multiplier=0.5, b_multiplier=0.75, **POINTS), dict(multiplier=0.01, **POINTS)


@pytest.mark.parametrize("op", ["lpsn.add", "lpsn.multiply"])
@pytest.mark.parametrize("second", [(12,), (10, 12), (1, 10, 1), (2, 3, 10, 12), (1, 2, 3, 10, 12), (1,)], ids=str)
@pytest.mark.parametrize("is_constant", [True, False], ids=["constant", "tensor"])
def test_elementwise_of_unequal_ranks(op, second, is_constant):
    attrs = SUM if op == "lpsn.add" else PRODUCT

    def body(net):
        x = net.conv("conv", net.quantize(net.x), 3)
        if is_constant:
            other = graph.constant(net.rng.integers(0, 255, second).astype(np.uint8))
        else:
            count, whole = int(np.prod(second)), int(np.prod(graph.shape_of(x)))
            flat = net.emit("flat", "lpsn.reshape", [x], shape=(whole,))
            cut = net.emit("cut", "lpsn.strided_slice", [flat], axes=[0], begin=[0], end=[count], strides=[1])
            other = net.emit("other", "lpsn.reshape", [cut], shape=second)
        return net.emit("result", op, [x, other], **attrs)

    check(Builder((2, 3, 10, 12)).build(body))


def test_tensors_of_five_axes():
    def body(net):
        x = reshaped(net, 1, 2, 3, 5, 12)
        moved = net.emit("moved", "lpsn.transpose", [x], axes=(0, 3, 1, 4, 2))
        scales = dict(multipliers=[1.0, 0.5], zero_points=[3, 110])
        joined = net.emit("joined", "lpsn.concat", [moved, moved], axis=1, **scales, **QUANTIZED)
        cut = net.emit("cut", "lpsn.strided_slice", [joined], axes=[1, 4], begin=[1, 0], end=[9, 3], strides=[3, 2])
        table = graph.constant(net.rng.integers(0, 256, 256).astype(np.uint8))
        looked = net.emit("looked", "lpsn.lookup", [cut, table], qmin=0)
        again = net.emit("again", "lpsn.requantize", [looked], multiplier=0.3, in_zero_point=3, **QUANTIZED)
        return net.emit("real", "lpsn.dequantize", [again], scale=0.5, zero_point=3)

    check(Builder((1, 3, 10, 12)).build(body))


@pytest.mark.parametrize("channels", [3, 16, 40])
def test_flatten_of_a_map(channels):
    def body(net):
        x = net.conv("conv", net.quantize(net.x), channels)
        return net.emit("flat", "lpsn.reshape", [x], shape=(2, channels * 120))

    check(Builder((2, 3, 10, 12)).build(body))
