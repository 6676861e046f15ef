"""What is an integer operator, what is fused, what stays float."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.passes.regions import Regions, find_regions
from tests.support.small_graphs import Net

op = relax.op


def kinds(regions: Regions) -> dict[str, str]:
    return {region.name: region.kind for region in regions.regions}


def test_layer_takes_bias_residual_and_relu() -> None:
    net = Net((1, 4, 8, 8))
    stem = net.emit(op.nn.relu(net.conv(net.input, 4, name="stem")), "stem.relu")
    body = net.emit(op.nn.relu(net.conv(stem, 4, name="a")), "a.relu")
    total = net.emit(op.add(net.conv(body, 4, name="b"), stem), "sum")
    out = net.dense(net.emit(op.reshape(net.emit(op.nn.relu(total), "sum.relu"), (1, 256)), "flat"), 10, name="fc")
    regions = find_regions(net.module(out))
    fused = regions.by_layer["b"]
    assert fused.members == ("b.acc", "b", "sum", "sum.relu")
    assert fused.inputs == ("a.relu", "stem.relu") and fused.residual == "stem.relu"
    assert fused.activation == (0.0, float("inf"))
    assert regions.by_layer["fc"].float_output and not regions.is_quantized("fc")
    assert regions.source("flat") == "sum.relu"
    assert regions.quantized == ("input", "stem.relu", "a.relu", "sum.relu", "flat")
    assert regions.float_nodes == {}


def test_of_two_layers_that_are_added_the_later_takes_the_sum() -> None:
    net = Net((1, 4, 8, 8))
    x = net.emit(op.nn.relu(net.conv(net.input, 4, name="stem")), "x")
    first, second = net.conv(x, 4, name="first"), net.conv(x, 4, 1, name="second")
    out = net.conv(net.emit(op.nn.relu(net.emit(op.add(second, first), "sum")), "r"), 2, name="last")
    regions = find_regions(net.module(out))
    assert regions.by_layer["second"].residual == "first" and regions.by_layer["first"].members == (
        "first.acc",
        "first",
    )
    assert [region.name for region in regions.regions] == ["x", "first", "r", "last"]


def test_output_with_another_reader_is_not_fused_with_the_sum() -> None:
    net = Net((1, 4, 8, 8))
    first = net.conv(net.input, 4, name="first")
    second = net.conv(first, 4, name="second")
    total = net.emit(op.add(first, second), "sum")
    out = net.conv(
        net.emit(
            op.concatenate([total, second]) if hasattr(op, "concatenate") else op.concat([total, second], 1), "cat"
        ),
        2,
        name="z",
    )
    regions = find_regions(net.module(out))
    assert kinds(regions) == {"first": "layer", "second": "layer", "sum": "add", "cat": "concat", "z": "layer"}


@pytest.mark.parametrize(
    ("clips", "expected"),
    [([(0, 6)], (0.0, 6.0)), ([(0, 6), (1, 8)], (1.0, 6.0)), ([(-1, 1), (2, 3)], (2.0, 2.0)), ([], None)],
    ids=["relu6", "nested", "disjoint", "none"],
)
def test_clamps_are_combined(clips: list[tuple[int, int]], expected: tuple[float, float] | None) -> None:
    net = Net((1, 4, 8, 8))
    x = net.conv(net.input, 4, name="a")
    for low, high in clips:
        x = net.emit(op.clip(x, float(low), float(high)))
    regions = find_regions(net.module(net.conv(x, 2)))
    assert regions.by_layer["a"].activation == expected
    # The combined clamp is the same function.
    if expected is not None:
        values = np.linspace(-9, 9, 181)
        nested = values
        for low, high in clips:
            nested = np.clip(nested, low, high)
        np.testing.assert_array_equal(nested, np.clip(values, *expected))


def test_what_is_computed_from_one_tensor_is_one_table() -> None:
    net = Net((1, 4, 8, 8))
    x = net.conv(net.input, 4, name="a")
    shifted = net.emit(op.clip(net.emit(op.add(x, relax.const(3.0)), "plus"), 0.0, 6.0), "clip")
    swish = net.emit(op.divide(net.emit(op.multiply(x, shifted), "times"), relax.const(6.0)), "hardswish")
    silu = net.emit(op.multiply(swish, net.emit(op.sigmoid(swish), "sig")), "silu")
    regions = find_regions(net.module(net.conv(net.emit(op.nn.max_pool2d(silu, (2, 2)), "p"), 2, name="z")))
    assert kinds(regions) == {"a": "layer", "silu": "lookup", "p": "same", "z": "layer"}
    assert regions.by_name["silu"].inputs == ("a",) and len(regions.by_name["silu"].members) == 6


def test_a_table_whose_middle_is_read_elsewhere_is_cut_there() -> None:
    net = Net((1, 4, 8, 8))
    x = net.conv(net.input, 4, name="a")
    y = net.emit(op.tanh(x), "tanh")
    z = net.emit(op.sigmoid(y), "sig")
    out = net.conv(net.emit(op.concat([net.conv(y, 4, name="b"), z], 1), "cat"), 2, name="c")
    regions = find_regions(net.module(out))
    assert regions.by_name["tanh"].inputs == ("a",)
    assert regions.by_name["sig"].inputs == ("tanh",) and regions.by_name["sig"].members == ("sig",)


def test_squeeze_and_excitation_is_an_integer_product() -> None:
    net = Net((1, 8, 8, 8))
    x = net.emit(op.nn.relu(net.conv(net.input, 8, name="a")), "x")
    pooled = net.emit(op.mean(x, [2, 3], keepdims=True), "mean")
    gate = net.emit(
        op.sigmoid(net.conv(net.emit(op.nn.relu(net.conv(pooled, 2, 1, name="s")), "r"), 8, 1, name="e")), "gate"
    )
    out = net.conv(net.emit(op.multiply(x, gate), "scaled"), 2, name="z")
    assert kinds(find_regions(net.module(out))) == {
        "x": "layer",
        "mean": "pool",
        "r": "layer",
        "e": "layer",
        "gate": "lookup",
        "scaled": "multiply",
        "z": "layer",
    }


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (4, 1, 1), ()], ids=str)
def test_constants_per_channel_make_a_table_per_channel(shape: tuple[int, ...]) -> None:
    net = Net((1, 4, 8, 8))
    x = net.conv(net.input, 4, name="a")
    y = net.emit(op.exp(net.emit(op.multiply(x, graph.constant(np.full(shape, 0.5, np.float32))), "m")), "y")
    region = find_regions(net.module(net.conv(y, 2))).by_name["y"]
    assert region.kind == "lookup" and region.per_channel == bool(shape)


def test_constant_that_is_neither_scalar_nor_per_channel_is_float() -> None:
    net = Net((1, 4, 8, 8))
    x = net.conv(net.input, 4, name="a")
    y = net.emit(op.multiply(x, graph.constant(np.ones((1, 1, 1, 8), np.float32))), "y")
    regions = find_regions(net.module(net.conv(y, 2, name="b")))
    assert "neither one number nor one per channel" in regions.float_nodes["y"]
    assert regions.by_layer["a"].float_output and regions.is_quantized("y")


def test_prelu_is_a_table_per_channel() -> None:
    net = Net((1, 4, 8, 8))
    y = net.emit(op.nn.prelu(net.conv(net.input, 4, name="a"), graph.constant(np.full(4, 0.2, np.float32)), 1), "y")
    assert find_regions(net.module(net.conv(y, 2))).by_name["y"].per_channel


def test_float_spreads_over_the_elementwise_operators_around_it() -> None:
    net = Net((1, 4, 8, 8))
    x = net.emit(op.nn.relu(net.conv(net.input, 4, name="a")), "x")
    norm = net.emit(op.nn.softmax(net.conv(x, 4, name="b"), 1), "soft")
    total = net.emit(op.add(net.emit(op.nn.relu(norm), "relu"), x), "sum")
    out = net.conv(total, 2, name="z")
    regions = find_regions(net.module(out))
    assert kinds(regions) == {
        "x": "layer",
        "b": "layer",
        "soft": "float",
        "relu": "float",
        "sum": "float",
        "z": "layer",
    }
    assert regions.by_layer["b"].float_output
    assert regions.quantized == ("input", "x", "sum")
    assert "no integer form" in regions.float_nodes["soft"]


def test_what_leads_only_to_the_output_is_float() -> None:
    net = Net((1, 4, 8, 8))
    x = net.emit(op.nn.relu(net.conv(net.input, 4, name="a")), "x")
    y = net.conv(x, 4, name="b")
    out = net.emit(op.tanh(net.emit(op.nn.pixel_shuffle(y, 2), "shuffle")), "tanh")
    regions = find_regions(net.module(out, net.emit(op.nn.softmax(x, 1), "aux")))
    assert regions.by_layer["b"].float_output and set(regions.float_nodes) == {"shuffle", "tanh", "aux"}
    assert regions.outputs == ("tanh", "aux")


def test_ignored_layers_stay_float() -> None:
    net = Net((1, 4, 8, 8))
    x = net.emit(op.nn.relu(net.conv(net.input, 4, name="stem/conv")), "x")
    regions = find_regions(net.module(net.conv(x, 2, name="head")), ignore=["stem*"])
    assert regions.float_nodes["stem/conv"] == "kept at float on request"
    assert regions.quantized == ("x",) and regions.by_layer["head"].inputs == ("x",)


def test_product_of_two_computed_tensors_is_float() -> None:
    net = Net((1, 8))
    a, b = net.dense(net.input, 8, name="a"), net.dense(net.input, 8, name="b")
    product = net.emit(op.matmul(a, net.emit(op.permute_dims(b), "t")), "p")
    regions = find_regions(net.module(net.dense(product, 2, name="z") if graph.shape_of(product)[1] > 1 else product))
    assert "two computed tensors" in regions.float_nodes["p"]


def test_inputs_of_regions_always_exist_before_them() -> None:
    net = Net((1, 4, 8, 8))
    x = net.input
    for _ in range(4):
        y = net.conv(net.emit(op.nn.relu(net.conv(x, 4))), 4)
        x = net.emit(op.nn.relu(net.emit(op.add(net.conv(x, 4, 1), y))))
    regions = find_regions(net.module(net.conv(x, 2)))
    known = set(regions.inputs)
    for region in regions.regions:
        assert set(region.inputs) <= known
        known.add(region.name)
