from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from small_graphs import Net, real_weight, weight_params
from tvm import relax

from lpsn_tvm import graph, quant
from lpsn_tvm.errors import QuantizeError
from lpsn_tvm.interpreter import TorchInterpreter
from lpsn_tvm.passes.integer_ops import IntegerTensor
from lpsn_tvm.passes.lower_layers import integer_weight, lower_layer
from lpsn_tvm.quant import QuantizedWeight, QuantParams


def build(kind: str, groups: int = 1) -> tuple:
    """(module, layer) of one layer of each kind, with attributes that are all different from the defaults."""
    net = Net((2, 10) if kind == "dense" else (2, 4, 7, 6), seed=3)
    if kind == "dense":
        out = net.dense(net.input, 5, "fc.1")
    elif kind == "conv2d":
        out = net.conv(net.input, 8, groups=groups, name="fc.1", padding=[1, 0, 2, 1], strides=[2, 1], dilation=[1, 2])
    else:
        out = net.conv_transpose(
            net.input, 8, 3, "fc.1", groups=groups, strides=[2, 2], padding=[1, 1, 0, 1], output_padding=[1, 0]
        )
    mod = net.module(out)
    return mod, graph.find_layers(mod)["fc.1"]


def integer_input(layer: graph.Layer, params: QuantParams) -> IntegerTensor:
    return IntegerTensor(relax.Var("x", relax.TensorType(layer.in_shape, params.dtype)), params)


def evaluate(call: relax.Call, x: np.ndarray) -> np.ndarray:
    constants = [graph.constant_value(arg) for arg in call.args[2:]]
    return quant.OPERATORS[graph.op_name(call)](x, *constants, **graph.call_attrs(call))


KINDS = [("dense", 1), ("conv2d", 1), ("conv2d", 4), ("conv2d", 2), ("conv2d_transpose", 1), ("conv2d_transpose", 2)]


@pytest.mark.parametrize(("kind", "groups"), KINDS)
@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("signed", [False, True], ids=["uint8", "int8"])
def test_integer_layer_is_the_float_layer_with_rounded_weights(kind: str, groups: int, bits: int, signed: bool) -> None:
    mod, layer = build(kind, groups)
    params = QuantParams(np.float32(0.03), -3 if signed else 101, 8, signed)
    weight = weight_params(layer, bits)
    x = np.random.default_rng(0).integers(params.qmin, params.qmax + 1, layer.in_shape).astype(params.dtype)
    got = evaluate(lower_layer(layer, weight, integer_input(layer, params), None), x)
    interpreter = TorchInterpreter(mod)
    interpreter.set_params(layer.name, real_weight(layer, weight), weight.bias)
    real = quant.dequantize(x, scale=0.03, zero_point=params.zero_point)
    want = interpreter.run({"input": real})["fc.1"].numpy()
    # The int32 bias is within half a unit of the accumulator.
    np.testing.assert_allclose(got, want, atol=0.03 * float(np.max(weight.params.scale)), rtol=1e-5)


@pytest.mark.parametrize(("kind", "groups"), KINDS)
def test_dead_channels_with_large_bias_keep_the_bias(kind: str, groups: int) -> None:
    _, layer = build(kind, groups)
    weight = weight_params(layer, 8)
    scale = np.broadcast_to(np.asarray(weight.params.scale), (layer.out_channels,)).copy()
    scale[1] = 1e-12
    bias = weight.bias.copy()
    bias[1] = 2.5
    weight = QuantizedWeight(weight.values, replace(weight.params, scale=scale), bias)
    x = integer_input(layer, QuantParams(np.float32(0.03), 7, 8, False))
    got = evaluate(lower_layer(layer, weight, x, None), np.full(layer.in_shape, 7, np.uint8))
    np.testing.assert_allclose(got[:, 1], 2.5, rtol=1e-6)


def test_bias_folds_the_zero_point_and_rounds_half_to_even() -> None:
    _, layer = build("dense")
    values = np.full((10, 5), 100, np.int8)
    bias = np.array([0.5, 1.5, 2.5, -0.5, 0.0], np.float32)
    weight = QuantizedWeight(values, QuantParams(np.float32(1.0), 0, 8, True), bias)
    call = lower_layer(layer, weight, integer_input(layer, QuantParams(np.float32(1.0), 3, 8, False)), None)
    np.testing.assert_array_equal(graph.constant_value(call.args[3]) + 3000, [0, 2, 2, 0, 0])
    np.testing.assert_array_equal(graph.constant_value(call.args[4]), 1.0)


def test_few_bits_get_a_finer_unit_so_that_the_bias_survives() -> None:
    _, layer = build("dense")
    weight = QuantizedWeight(
        np.ones((10, 5), np.int8), QuantParams(np.float32(0.5), 0, 2, True), np.full(5, 0.3, np.float32)
    )
    x, out = QuantParams(np.float32(1.0), 0, 2, False), QuantParams(np.float32(0.5), 0, 2, False)
    values, bias, unit = integer_weight(layer, weight, x, out)
    assert set(values.flat) == {16} and np.all(unit == 0.5 / 16)
    np.testing.assert_allclose(bias * unit, 0.3, atol=0.5 / 32)
    eight = QuantizedWeight(
        np.full((10, 5), 100, np.int8), QuantParams(np.float32(0.005), 0, 8, True), np.full(5, 0.3, np.float32)
    )
    np.testing.assert_array_equal(integer_weight(layer, eight, x, out)[0], 100)


def big_dense(inputs: int) -> tuple[graph.Layer, QuantizedWeight]:
    _, layer = build("dense")
    layer = replace(layer, in_shape=(1, inputs), out_shape=(1, 1), bias=np.zeros(1, np.float32))
    values = np.full((inputs, 1), 127, np.int8)
    return layer, QuantizedWeight(values, QuantParams(np.float32(1.0), 0, 8, True), np.zeros(1, np.float32))


def test_a_layer_that_could_overflow_is_refused_by_name() -> None:
    params = QuantParams(np.float32(1.0), 0, 8, False)
    layer, weight = big_dense(66_000)
    integer_weight(layer, weight, params)
    layer, weight = big_dense(67_000)
    with pytest.raises(QuantizeError, match=r"fc\.1: the worst case of its accumulator"):
        integer_weight(layer, weight, params)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_scales_must_be_positive_numbers(scale: float) -> None:
    _, layer = build("dense")
    weight = QuantizedWeight(
        np.ones((10, 5), np.int8), QuantParams(np.float32(scale), 0, 8, True), np.zeros(5, np.float32)
    )
    with pytest.raises(QuantizeError, match=r"fc\.1"):
        integer_weight(layer, weight, QuantParams(np.float32(1.0), 0, 8, False))


def test_residual_and_clamp_go_into_the_epilogue() -> None:
    _, layer = build("conv2d", 4)
    params, out = QuantParams(np.float32(0.03), 7, 8, False), QuantParams(np.float32(0.1), 5, 8, False)
    residual = IntegerTensor(
        relax.Var("r", relax.TensorType(layer.out_shape, "uint8")), QuantParams(np.float32(0.2), 9, 8, False)
    )
    call = lower_layer(layer, weight_params(layer, 8), integer_input(layer, params), out, (0.0, 6.0), residual)
    attrs = graph.call_attrs(call)
    assert (attrs["qmin"], attrs["qmax"], attrs["residual_multiplier"], attrs["residual_zero_point"]) == (5, 65, 2.0, 9)
    assert call.args[-1].name == "r"
