"""import_model: names, inputs and outputs, errors."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import pytest
from onnx import helper

from lpsn_tvm import graph
from lpsn_tvm.errors import ModelError, UnsupportedOpError
from lpsn_tvm.frontend import import_model, load_model
from tests.support.onnx_nets import OnnxNet, canonical, max_error, random_feeds, run_module, run_onnx


def names(mod: object) -> list[str]:
    return [var.name for var, value in graph.bindings(mod) if graph.op_name(value)]  # type: ignore[arg-type]


def test_variables_carry_the_exact_node_names() -> None:
    net = OnnxNet()
    x = net.input("input.1/image:0", "N", 3, 8, 8)
    c = net.add("Conv", x, net.weight(4, 3, 3, 3), net.weight(4), name="/layer1/layer1.0/conv")
    model = net.model(net.add("Relu", c, name="model.features.relu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        imported = import_model(load_model(model))
    assert names(imported.mod) == ["/layer1/layer1.0/conv.acc", "/layer1/layer1.0/conv", "model.features.relu"]
    assert [param.name for param in imported.mod["main"].params] == ["input.1/image:0"]
    assert imported.input_names == ("input.1/image:0",)
    assert imported.output_names == ("model.features.relu",)


def test_several_inputs_and_outputs_keep_their_order() -> None:
    net = OnnxNet()
    b, a = net.input("b", 1, 2, 3, 3), net.input("a", 1, 2, 3, 3)
    model = net.model(net.add("Add", a, b, name="sum"), net.add("Sub", b, a, name="difference"), "b")
    model.graph.output[2].CopyFrom(model.graph.input[0])
    imported = import_model(load_model(model))
    assert (imported.input_names, imported.output_names) == (("b", "a"), ("sum", "difference", "b"))
    feeds = random_feeds(model)
    for got, expected in zip(run_module(canonical(model), list(feeds.values())), run_onnx(model, feeds), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_node_named_like_a_made_up_variable() -> None:
    """`gv`, `lv` and `<node>.acc` are names that this package or TVM makes up."""
    net = OnnxNet()
    x = net.input("x", 1, 3, 8, 8)
    c = net.add("Conv", x, net.weight(3, 3, 1, 1), net.weight(3), name="c")
    g = net.add("Conv", net.add("Relu", c, name="gv"), net.weight(3, 3, 1, 1), name="lv")
    s = net.add("Softsign", net.add("Tanh", g, name="c.acc"), name="c.1")
    model = net.model(net.add("HardSwish", s, name="c.1.1"))
    assert len(names(canonical(model))) == len(set(names(canonical(model))))
    assert max_error(model) < 1e-5


def test_a_custom_domain_is_named() -> None:
    net = OnnxNet()
    model = net.model(net.add("Fancy", net.input("x", 1, 3), name="strange", domain="my.domain"))
    model.opset_import.append(helper.make_opsetid("my.domain", 1))
    with pytest.raises(UnsupportedOpError, match=r"node 'strange' \(Fancy\): operator Fancy of domain 'my.domain'"):
        import_model(load_model(model))


def test_an_unknown_operator_is_named() -> None:
    net = OnnxNet()
    values = net.add("NonZero", net.input("x", 1, 3), name="where")
    with pytest.raises(
        UnsupportedOpError, match=r"node 'where' \(NonZero\): operator NonZero of domain 'ai.onnx' \(opset 17\)"
    ):
        import_model(load_model(net.model(values)))


def test_integer_operators_come_with_advice() -> None:
    net = OnnxNet()
    model = net.model(net.add("DynamicQuantizeLinear", net.input("x", 1, 3), name="q", outputs=3)[0])
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    with pytest.raises(UnsupportedOpError, match="QDQ format"):
        import_model(load_model(model))


def test_a_failing_conversion_names_the_node_and_keeps_the_cause() -> None:
    net = OnnxNet()
    x = net.input("x", 1, 3, 8, 8)
    model = net.model(net.add("Conv", x, net.weight(4, 3, 3, 3), name="bad", group=1))
    loaded = load_model(model)
    loaded.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(np.zeros((4, 5, 3, 3), np.float32), loaded.graph.initializer[0].name)
    )
    with pytest.raises(ModelError, match=r"node 'bad' \(Conv\): cannot be converted: ") as caught:
        import_model(loaded)
    assert caught.value.__cause__ is not None


def test_weights_that_are_inputs_are_refused() -> None:
    net = OnnxNet()
    x, w = net.input("x", 1, 3, 8, 8), net.input("w", 4, 3, 3, 3)
    with pytest.raises(UnsupportedOpError, match=r"node 'conv' \(Conv\): the weight is computed at run time"):
        import_model(load_model(net.model(net.add("Conv", x, w, name="conv"))))


def test_comparisons_are_refused_by_name() -> None:
    net = OnnxNet()
    x = net.input("x", 1, 3)
    mask = net.add("Cast", net.add("Greater", x, net.const(0.0), name="mask"), to=1)
    with pytest.raises(UnsupportedOpError, match="node 'mask'"):
        import_model(load_model(net.model(mask)))


def test_group_normalization() -> None:
    net = OnnxNet()
    x = net.input("x", 1, 8, 5, 4)
    assert (
        max_error(net.model(net.add("GroupNormalization", x, net.weight(8), net.weight(8), num_groups=2), opset=21))
        < 1e-4
    )


def test_not_finite_weights_are_refused() -> None:
    net = OnnxNet()
    x = net.input("x", 1, 3, 8, 8)
    weight = np.zeros((4, 3, 3, 3), np.float32)
    weight[1, 0, 0, 0] = np.nan
    with pytest.raises(ModelError, match="layer 'conv': the weights are not finite"):
        canonical(net.model(net.add("Conv", x, net.const(weight), name="conv")))


def test_a_constant_output_is_refused() -> None:
    net = OnnxNet()
    net.input("x", 1, 3)
    with pytest.raises(ModelError, match="does not depend on any input"):
        import_model(load_model(net.model(net.add("Relu", net.const([1.0, 2.0])))))
