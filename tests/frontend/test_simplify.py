"""Shape arithmetic as exporters write it is gone after load_model, the numbers and the names of the other nodes are
not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from lpsn_tvm.frontend import load_model
from tests.support.onnx_nets import OnnxNet, max_error, random_feeds, run_onnx

Build = Callable[[OnnxNet, str], str]


def computed_reshape(net: OnnxNet, x: str) -> str:
    """`y.view(y.size(0), -1)`."""
    shape = net.add("Shape", x)
    batch = net.add("Gather", shape, net.const(0, "int64"), axis=0)
    target = net.add("Concat", net.add("Unsqueeze", batch, net.const([0], "int64")), net.const([-1], "int64"), axis=0)
    return str(net.add("Reshape", x, target, name="view"))


def computed_slice_reshape(net: OnnxNet, x: str) -> str:
    """Channels split in two by shape arithmetic, as ShuffleNet's export does."""
    shape = net.add("Shape", x)
    channels = net.add("Slice", shape, net.const([1], "int64"), net.const([2], "int64"))
    half = net.add("Div", channels, net.const([2], "int64"))
    rest = net.add("Slice", shape, net.const([2], "int64"), net.const([4], "int64"))
    first = net.add("Slice", shape, net.const([0], "int64"), net.const([1], "int64"))
    wide = net.add("Reshape", x, net.add("Concat", first, net.const([2], "int64"), half, rest, axis=0), name="wide")
    return str(
        net.add(
            "Reshape",
            net.add("Transpose", wide, perm=[0, 2, 1, 3, 4], name="swap"),
            net.add("Concat", first, channels, rest, axis=0),
            name="narrow",
        )
    )


def computed_pad(net: OnnxNet, x: str) -> str:
    """ConstantOfShape -> Concat -> Reshape -> Slice -> Transpose -> Pad, as torch writes F.pad."""
    zeros = net.add(
        "ConstantOfShape",
        net.const([4], "int64"),
        value=onnx.helper.make_tensor("zero", onnx.TensorProto.INT64, [1], [0]),
    )
    pads = net.add("Concat", net.const([1, 2, 0, 3], "int64"), zeros, axis=0)
    pairs = net.add("Reshape", pads, net.const([-1, 2], "int64"))
    flipped = net.add(
        "Slice",
        pairs,
        net.const([-1], "int64"),
        net.const([-(2**31)], "int64"),
        net.const([0], "int64"),
        net.const([-1], "int64"),
    )
    flat = net.add("Reshape", net.add("Transpose", flipped, perm=[1, 0]), net.const([-1], "int64"))
    return str(net.add("Pad", x, flat, name="pad"))


def computed_resize(net: OnnxNet, x: str) -> str:
    """Resize to the size of another tensor."""
    small = net.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], name="pool")
    sizes = net.add("Slice", net.add("Shape", x), net.const([2], "int64"), net.const([4], "int64"))
    head = net.add("Slice", net.add("Shape", small), net.const([0], "int64"), net.const([2], "int64"))
    target = net.add("Concat", head, net.add("Cast", sizes, to=onnx.TensorProto.INT64), axis=0)
    return str(
        net.add(
            "Resize", small, "", "", target, mode="linear", coordinate_transformation_mode="half_pixel", name="resize"
        )
    )


CASES: dict[str, tuple[Build, list[str]]] = {
    "reshape": (computed_reshape, ["view"]),
    "slice-reshape": (computed_slice_reshape, ["wide", "swap", "narrow"]),
    "pad": (computed_pad, ["pad"]),
    "resize": (computed_resize, ["pool", "resize"]),
}


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("batch", [1, 3])
def test_only_the_real_nodes_stay(name: str, batch: int) -> None:
    build, nodes = CASES[name]
    net = OnnxNet()
    model = net.model(build(net, net.input("x", "N", 4, 8, 6)))
    loaded = load_model(model, batch=batch)
    assert [node.name for node in loaded.graph.node] == nodes
    feeds = random_feeds(loaded)
    np.testing.assert_array_equal(run_onnx(loaded, feeds)[0], run_onnx(model, feeds)[0])


@pytest.mark.parametrize("name", list(CASES))
def test_imports(name: str) -> None:
    net = OnnxNet()
    assert max_error(net.model(CASES[name][0](net, net.input("x", "N", 4, 8, 6)))) < 1e-5


def test_dead_nodes_and_weights_go() -> None:
    net = OnnxNet()
    x = net.input("x", 1, 4, 8, 6)
    net.add("Conv", x, net.weight(4, 4, 3, 3))
    loaded = load_model(net.model(net.add("Relu", x, name="relu")))
    assert [node.name for node in loaded.graph.node] == ["relu"]
    assert not loaded.graph.initializer
