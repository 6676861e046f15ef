"""Narrow feature maps with several pixels per tile: fewer micro-operations, the same numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vta_graphs import GraphBuilder, tile_ops

from lpsn_tvm.targets.vta.config import PRESETS


def packed(network: object, name: str) -> bool:
    """Whether `name` is in a form that the host cannot read."""
    return network.tensors[name].value == ""  # type: ignore[attr-defined]


@pytest.mark.parametrize("preset", ["pynq", "pynq-i4", "pynq-4x8"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_two_layers(preset: str, data: st.DataObject) -> None:
    """First layer from the host or not, with and without a pooling, any padding."""
    b = GraphBuilder(PRESETS[preset], data.draw(st.integers(0, 1000)))
    bits = data.draw(st.sampled_from([4, 7])) if preset == "pynq-i4" else 8
    x = b.input(data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), 8, data.draw(st.integers(8, 13)), bits=bits)
    if data.draw(st.booleans()):
        x = b.conv2d(x, 10, 1)
    channels = data.draw(st.integers(1, b.config.block_in // 2))
    value = data.draw(st.sampled_from([0, 0, -b.limit, 3]))
    kernel, stride = (3, data.draw(st.integers(1, 5))), data.draw(st.integers(1, 2))
    y = b.conv2d(x, channels, kernel, stride, (1, 2, 0, 2), x_zero_point=value)
    if data.draw(st.booleans()):
        y = b.max_pool2d(y, 2, 2)
    z = b.conv2d(y, 20, (2, data.draw(st.integers(2, 3))), padding=(1, data.draw(st.integers(0, 1)), 1, 1))
    b.check(b.dequantize(z))


def lenet(b: GraphBuilder) -> str:
    x = b.max_pool2d(b.conv2d(b.input(1, 1, 28, 28), 6, 5, qmin=0))
    x = b.max_pool2d(b.conv2d(x, 16, 5, padding=0, qmin=0))
    x = b.dense(b.dense(b.reshape(x, 1, 400), 120, qmin=0), 84, qmin=0)
    return b.dense(x, 10, out_dtype="float32")


def test_lenet_takes_less_than_3000_micro_operations() -> None:
    b = GraphBuilder(PRESETS["pynq"])
    network = b.check(lenet(b))
    counts = [op.micro_operations for op in tile_ops(network)]
    assert counts == [1176, 1500, 200, 48, 6]


def test_readers_that_gain_nothing_get_plain_tiles() -> None:
    """A sum, a strided convolution, a 1x1, two readers, a network output."""
    b = GraphBuilder(PRESETS["pynq"])
    x = b.input(1, 3, 8, 8)
    names = [b.conv2d(x, 6) for _ in range(5)]
    ends = [
        b.sum(names[0], names[0]),
        b.conv2d(names[1], 8, 3, 2),
        b.conv2d(names[2], 8, 1),
        b.conv2d(names[3], 8),
        b.conv2d(names[3], 8),
        names[4],
    ]
    network = b.check(*(b.dequantize(name) for name in ends))
    assert not any(packed(network, name) for name in names)


def test_a_width_that_does_not_divide_stays_plain() -> None:
    b = GraphBuilder(PRESETS["pynq"])
    y = b.conv2d(b.input(1, 3, 7, 7), 8)
    assert not packed(b.check(b.dequantize(b.conv2d(y, 8))), y)
    b = GraphBuilder(PRESETS["pynq"])
    y = b.conv2d(b.input(1, 3, 7, 9), 5)
    assert packed(b.check(b.dequantize(b.conv2d(y, 8))), y)
