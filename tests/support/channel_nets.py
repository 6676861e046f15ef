"""Small canonical networks, one per way in which channels are tied together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from lpsn_tvm import graph
from tests.support.small_graphs import Net

op = relax.op


def residual(net: Net) -> Any:
    """Two residual blocks on one stream, the second with a depthwise layer."""
    a = net.emit(op.nn.relu(net.conv(net.input, 8, name="a")))
    inner = net.emit(op.nn.relu(net.conv(a, 6, name="b1")))
    s = net.emit(op.add(net.conv(inner, 8, name="b2"), a), "s")
    dw = net.emit(op.clip(net.conv(s, 8, groups=8, name="dw"), 0, 6))
    s2 = net.emit(op.add(net.conv(dw, 8, kernel=1, name="c"), s), "s2")
    return net.conv(s2, 5, name="last")


def dense_block(net: Net) -> Any:
    """Concatenations read by several layers."""
    a = net.conv(net.input, 4, name="a")
    b = net.conv(a, 6, name="b")
    ab = net.emit(op.concat([a, b], 1), "ab")
    c = net.conv(net.emit(op.nn.relu(ab)), 5, name="c")
    abc = net.emit(op.concat([ab, c, net.input], 1), "abc")
    return net.conv(net.emit(op.nn.max_pool2d(abc, [2, 2], [2, 2])), 3, name="last")


def split(net: Net) -> Any:
    """A split whose halves go different ways; one half meets another layer."""
    a = net.conv(net.input, 10, name="a")
    left = net.emit(op.strided_slice(a, [1], [0], [4], [1]), "left")
    right = net.emit(op.strided_slice(a, [1], [4], [10], [1]), "right")
    b = net.conv(left, 6, name="b")
    s = net.emit(op.multiply(net.emit(op.sigmoid(right)), b), "s")
    return net.conv(net.emit(op.concat([left, s], 1)), 3, name="last")


def squeeze_excitation(net: Net) -> Any:
    """Gates from dense layers behind a global mean."""
    a = net.conv(net.input, 8, name="a")
    mean = net.emit(op.reshape(net.emit(op.mean(a, [2, 3], True)), (1, 8)))
    reduce = net.emit(op.nn.relu(net.dense(mean, 4, name="reduce")))
    gate = net.emit(op.sigmoid(net.dense(reduce, 8, name="expand")))
    scaled = net.emit(op.multiply(a, net.emit(op.reshape(gate, (1, 8, 1, 1)))), "scaled")
    return net.conv(scaled, 3, name="last")


def grouped(net: Net) -> Any:
    """A grouped layer with few groups (same positions) and one with many (whole groups)."""
    a = net.conv(net.input, 8, name="a")
    b = net.conv(net.emit(op.nn.relu(a)), 12, groups=2, name="positions")
    c = net.conv(b, 12, groups=6, name="whole")
    return net.conv(net.emit(op.tanh(c)), 3, name="last")


def multiplier(net: Net) -> Any:
    """Depthwise layer with two outputs per input."""
    a = net.conv(net.input, 6, name="a")
    return net.conv(net.conv(a, 12, groups=6, name="dw"), 3, name="last")


def depth_to_space(net: Net, crd: bool = False) -> Any:
    """Depth to space between two layers, spelt as ONNX importers spell it."""
    a = net.conv(net.input, 16, name="a")
    blocks = (1, 4, 2, 2, 8, 8) if crd else (1, 2, 2, 4, 8, 8)
    order = (0, 1, 4, 2, 5, 3) if crd else (0, 3, 4, 1, 5, 2)
    b = net.emit(op.permute_dims(net.emit(op.reshape(a, blocks), "blocks"), order), "order")
    return net.conv(net.emit(op.reshape(b, (1, 4, 16, 16)), "image"), 3, name="last")


def flatten(net: Net) -> Any:
    """Convolutions, flatten, two dense layers."""
    a = net.emit(op.nn.avg_pool2d(net.conv(net.input, 6, name="a"), [2, 2], [2, 2]))
    b = net.emit(op.nn.relu(net.dense(net.emit(op.reshape(a, (1, 96)), "flat"), 7, name="fc1")))
    return net.dense(b, 4, name="fc2")


def transposed(net: Net) -> Any:
    """Encoder and decoder with a skip concatenation, transposed and grouped transposed convolution."""
    a = net.emit(op.nn.relu(net.conv(net.input, 6, name="a")))
    b = net.conv(net.emit(op.nn.max_pool2d(a, [2, 2], [2, 2])), 8, name="b")
    up = net.conv_transpose(b, 5, name="up", strides=[2, 2])
    depthwise = net.conv_transpose(net.emit(op.concat([up, a], 1), "skip"), 11, kernel=1, groups=11, name="dwt")
    return net.conv(net.conv_transpose(depthwise, 4, kernel=1, name="mix"), 3, name="last")


def per_channel(net: Net) -> Any:
    """PReLU, affine constants, instance norm, resize, reflected padding."""
    values = net.rng.normal(1, 0.3, (4, 8)).astype(np.float32)
    a = net.emit(op.nn.prelu(net.conv(net.input, 8, name="a"), graph.constant(values[0]), 1), "prelu")
    b = net.emit(op.multiply(a, graph.constant(values[1].reshape(8, 1, 1))), "scale")
    b = net.emit(op.subtract(b, graph.constant(values[2].reshape(1, 8, 1, 1))), "offset")
    c = net.emit(op.nn.instance_norm(b, graph.constant(values[3]), graph.constant(values[0]), 1, [2, 3]), "norm")
    c = net.emit(
        op.image.resize2d(
            c,
            (16, 16),
            layout="NCHW",
            method="nearest_neighbor",
            rounding_method="floor",
            coordinate_transformation_mode="asymmetric",
        )
    )
    c = net.emit(op.nn.pad(c, [0, 0, 0, 0, 1, 1, 1, 1], "reflect"))
    return net.conv(c, 3, name="last")


def channels_last(net: Net) -> Any:
    """A stretch with the channels in the last axis."""
    a = net.emit(op.permute_dims(net.conv(net.input, 8, name="a"), (0, 2, 3, 1)), "nhwc")
    a = net.emit(op.add(a, graph.constant(net.rng.normal(0, 1, 8).astype(np.float32))), "shift")
    b = net.emit(op.permute_dims(net.emit(op.nn.relu(a)), (0, 3, 1, 2)))
    return net.conv(b, 3, name="last")


def padded_shortcut(net: Net) -> Any:
    """A shortcut widened with zero channels, and a constant joined as a channel."""
    a = net.conv(net.input, 4, name="a")
    wide = net.emit(op.nn.pad(a, [0, 0, 2, 2, 0, 0, 0, 0]), "wide")
    s = net.emit(op.add(net.conv(a, 8, name="b"), wide), "s")
    grid = graph.constant(net.rng.normal(0, 1, (1, 2, 8, 8)).astype(np.float32))
    joined = net.emit(op.concat([s, grid], 1), "joined")
    t = net.emit(op.add(net.conv(s, 10, name="c"), joined), "t")
    return net.conv(t, 3, name="last")


def shuffle(net: Net) -> Any:
    """Channel shuffle between grouped layers (ShuffleNet)."""
    a = net.conv(net.input, 12, name="a")
    b = net.emit(op.permute_dims(net.emit(op.reshape(a, (1, 2, 6, 8, 8))), (0, 2, 1, 3, 4)))
    return net.conv(net.emit(op.reshape(b, (1, 12, 8, 8))), 3, name="last")


def gather(net: Net) -> Any:
    """Depth to space in DCR order as canonical form has it: a channel permutation, then pixel_shuffle."""
    a = net.conv(net.input, 16, name="a")
    order = graph.constant(np.arange(16, dtype=np.int64).reshape(4, 4).T.ravel())
    image = net.emit(op.nn.pixel_shuffle(net.emit(op.take(a, order, 1), "permuted"), 2), "image")
    backwards = net.emit(op.strided_slice(image, [2], [15], [-17], [-1]), "backwards")
    return net.conv(backwards, 3, name="last")


def depth_to_space_elsewhere(net: Net) -> Any:
    """Between depth-to-space and the next layer: a global mean, a gate, padding, a concatenation."""
    a = net.emit(op.nn.pixel_shuffle(net.conv(net.input, 24, name="a"), 2), "image")
    gate = net.conv(net.emit(op.mean(a, [2, 3], True), "mean"), 6, kernel=1, name="gate")
    gated = net.emit(op.multiply(a, gate), "gated")
    other = net.emit(op.nn.pixel_shuffle(net.conv(net.input, 8, name="b"), 2), "other")
    joined = net.emit(op.nn.pad(net.emit(op.concat([gated, other], 1), "joined"), [0, 0, 0, 0, 1, 1, 1, 1], "reflect"))
    return net.conv(joined, 3, name="last")


def rows(net: Net) -> Any:
    """Images joined along their height: both layers carry the same channels."""
    a, b = net.conv(net.input, 6, name="a"), net.conv(net.input, 6, name="b")
    return net.conv(net.emit(op.concat([a, b], 2), "tall"), 3, name="last")


NETS: dict[str, Callable[[Net], Any]] = {
    f.__name__: f
    for f in (
        residual,
        dense_block,
        split,
        squeeze_excitation,
        grouped,
        multiplier,
        depth_to_space,
        flatten,
        transposed,
        per_channel,
        channels_last,
        padded_shortcut,
        shuffle,
        rows,
        gather,
        depth_to_space_elsewhere,
    )
}
NETS["depth_to_space_crd"] = lambda net: depth_to_space(net, crd=True)


def make(name: str, seed: int = 0) -> Any:
    """The canonical module of network `name`."""
    net = Net((1, 3, 8, 8), seed)
    return net.module(NETS[name](net))
