"""Quantize / dequantize pairs leave the graph; their parameters and their effect on the numbers stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from lpsn_tvm import graph
from lpsn_tvm.errors import UnsupportedOpError
from lpsn_tvm.frontend import import_model, load_model
from lpsn_tvm.passes.canonicalize import canonicalize
from tests.support.onnx_nets import OnnxNet, random_feeds, run_module, run_onnx


def pair(net: OnnxNet, x: str, scale: float, zero_point: int, dtype: str = "uint8", name: str | None = None) -> str:
    operands = net.const(scale), net.const(zero_point, dtype)
    return str(net.add("DequantizeLinear", net.add("QuantizeLinear", x, *operands, name=name), *operands))


def integer_weight(net: OnnxNet, *shape: int, axis: int = 0) -> tuple[str, Any]:
    values = net.rng.integers(-127, 128, shape).astype(np.int8)
    scale = net.rng.uniform(0.005, 0.01, shape[axis]).astype(np.float32)
    operands = net.const(values, "int8"), net.const(scale), net.const(np.zeros(shape[axis]), "int8")
    return str(net.add("DequantizeLinear", *operands, axis=axis)), scale


def network() -> tuple[onnx.ModelProto, Any]:
    net = OnnxNet()
    x = net.input("x", "N", 3, 8, 8)
    weight, scale = integer_weight(net, 4, 3, 3, 3)
    c = net.add("Conv", pair(net, x, 0.05, 120), weight, net.weight(4), name="conv")
    hidden = pair(net, c, 0.02, 0, name="q")  # stands for a ReLU that the quantizer removed
    d = net.add("Conv", hidden, net.weight(4, 4, 1, 1), name="conv2")
    return net.model(pair(net, d, 0.03, 128)), scale


def test_parameters_are_kept_under_canonical_names() -> None:
    model, scale = network()
    renamed: dict[str, str] = {}
    imported = import_model(load_model(model))
    mod = canonicalize(imported.mod, renamed=renamed)
    kept = imported.canonical_qdq(mod, renamed)
    assert {name: (round(float(p.scale), 6), p.zero_point, p.bits, p.signed) for name, p in kept.items()} == {
        "x": (0.05, 120, 8, False),
        "q": (0.02, 0, 8, False),
        "conv2": (0.03, 128, 8, False),
    }
    np.testing.assert_allclose(imported.qdq_weights["conv"].scale, scale)
    assert imported.qdq_weights["conv"].axis == 0
    assert list(imported.qdq_weights) == ["conv"]


def test_the_float_graph_is_near_the_quantized_one() -> None:
    model, _ = network()
    mod = canonicalize(import_model(load_model(model)).mod)
    assert [graph.op_name(value) for _, value in graph.bindings(mod)][:6] == [
        "relax.nn.conv2d", "relax.add", "relax.clip", "relax.nn.conv2d", "relax.add", "",
    ]  # fmt: skip
    feeds = random_feeds(model)
    expected, got = run_onnx(model, feeds)[0], run_module(mod, list(feeds.values()))[0]
    # Without the clip the maximum is 8; what is left is the rounding of the inputs, times weights of about 0.5.
    assert np.abs(expected - got).max() < 0.3
    assert np.sqrt(np.mean((expected - got) ** 2)) < 0.06 * expected.std()


def test_scales_follow_a_folded_batch_norm() -> None:
    net = OnnxNet()
    x = net.input("x", 1, 3, 8, 8)
    c = net.add("Conv", x, net.weight(4, 3, 3, 3), name="conv")
    b = net.add(
        "BatchNormalization",
        pair(net, c, 0.5, 7),
        net.weight(4),
        net.weight(4),
        net.weight(4),
        net.const(np.ones(4)),
        name="bn",
    )
    imported = import_model(load_model(net.model(pair(net, b, 0.25, 9))))
    renamed: dict[str, str] = {}
    mod = canonicalize(imported.mod, renamed=renamed)
    kept = imported.canonical_qdq(mod, renamed)
    assert {name: params.zero_point for name, params in kept.items()} == {"conv": 9}


def test_weight_scales_do_not_survive_a_folded_batch_norm() -> None:
    """The convolution that batch norm changed loses its grid, the one behind it keeps its own."""
    net = OnnxNet()
    x = net.input("x", 1, 3, 8, 8)
    first = net.add("Conv", x, integer_weight(net, 4, 3, 3, 3)[0], name="first")
    b = net.add("BatchNormalization", first, net.weight(4), net.weight(4), net.weight(4), net.const(np.ones(4)))
    imported = import_model(
        load_model(net.model(net.add("Conv", b, integer_weight(net, 4, 4, 1, 1)[0], name="second")))
    )
    assert list(imported.qdq_weights) == ["first", "second"]
    assert list(imported.canonical_qdq_weights(canonicalize(imported.mod))) == ["second"]


def test_fake_quantized_constants_become_weights() -> None:
    """QuantizeLinear of a float constant, as quantization-aware training writes it."""
    net = OnnxNet()
    x = net.input("x", 1, 3, 4, 4)
    weight = pair(net, net.weight(4, 3, 1, 1), 0.01, 0, "int8")
    model = net.model(net.add("Conv", x, weight, name="conv"))
    imported = import_model(load_model(model))
    assert imported.qdq_weights["conv"].signed
    assert float(imported.qdq_weights["conv"].scale) == pytest.approx(0.01)
    feeds = random_feeds(model)
    np.testing.assert_allclose(
        run_module(canonicalize(imported.mod), list(feeds.values()))[0], run_onnx(model, feeds)[0], atol=1e-5
    )


def test_four_bit_scales() -> None:
    net = OnnxNet()
    x = net.input("x", 1, 3, 4, 4)
    zero = onnx.helper.make_tensor("zero", onnx.TensorProto.UINT4, [], [8])
    net.weights.append(zero)
    scale = net.const(0.1)
    r = net.add("Tanh", x, name="t")
    model = net.model(
        net.add("DequantizeLinear", net.add("QuantizeLinear", r, scale, "zero"), scale, "zero"),
        opset=21,
        ir_version=10,
    )
    params = import_model(load_model(model)).qdq["t"]
    assert (params.bits, params.signed, params.zero_point) == (4, False, 8)


def test_operators_on_integers_are_refused_with_advice() -> None:
    net = OnnxNet()
    q = net.add("QuantizeLinear", net.input("x", 1, 3, 4, 4), net.const(0.1), net.const(0, "uint8"))
    pooled = net.add("MaxPool", q, kernel_shape=[2, 2], name="pool")
    model = net.model(net.add("DequantizeLinear", pooled, net.const(0.1), net.const(0, "uint8")))
    with pytest.raises(UnsupportedOpError, match=r"node 'pool' \(MaxPool\).*QDQ format"):
        load_model(model)
