"""Depth to space in a convolution's epilogue: golden modules, and the same numbers."""

import numpy as np
import pytest
import tvm
from integer_network import Builder
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.errors import CompileError, QuantizeError
from lpsn_tvm.passes.float_calls import float_call
from lpsn_tvm.passes.fuse_pixel_shuffle import fuse_pixel_shuffle
from lpsn_tvm.reference import run_reference
from lpsn_tvm.targets import get_backend


def shuffled(net, x, mode, block=2):
    n, channels, height, width = graph.shape_of(x)
    shape = (n, channels // block**2, height * block, width * block)
    call = float_call("lpsn.float_depth_to_space", [x], {"block_size": block, "mode": mode}, shape)
    return graph.emit_named(net.builder, call, "y")


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_golden(mode):
    before = Builder().build(
        lambda net: shuffled(net, net.conv("a", net.quantize(net.x), 12, out_dtype="float32"), mode)
    )
    expected = Builder().build(
        lambda net: net.conv("y", net.quantize(net.x), 12, out_dtype="float32", block_size=2, mode=mode)
    )
    after = fuse_pixel_shuffle(before)
    tvm.ir.assert_structural_equal(after, expected)
    assert [var.name for var, _ in graph.bindings(after)][:2] == ["q", "y"]
    feeds = {"x": np.random.default_rng(1).standard_normal((1, 3, 10, 12)).astype(np.float32)}
    (got,), (want,) = run_reference(after, feeds).values(), run_reference(before, feeds).values()
    np.testing.assert_array_equal(got, want)


def two_outputs(net):
    a = net.conv("a", net.quantize(net.x), 12, out_dtype="float32")
    return relax.Tuple([shuffled(net, a, "DCR"), a])


def in_groups(net):
    return shuffled(net, net.conv("a", net.quantize(net.x), 12, groups=3, out_dtype="float32"), "DCR")


def of_the_input(net):
    padded = float_call("lpsn.float_reshape", [net.x], {"shape": (1, 12, 5, 6)}, (1, 12, 5, 6))
    return shuffled(net, graph.emit_named(net.builder, padded, "r"), "DCR")


@pytest.mark.parametrize("body", [two_outputs, in_groups, of_the_input])
def test_stays_apart(body):
    before = Builder().build(body)
    tvm.ir.assert_structural_equal(fuse_pixel_shuffle(before), before)


@pytest.mark.parametrize(("channels", "dtype"), [(12, "uint8"), (10, "float32")])
def test_only_floats_of_enough_channels(channels, dtype):
    with pytest.raises(QuantizeError, match="float32 and a multiple of 4 are needed"):
        Builder().build(lambda net: net.conv("a", net.quantize(net.x), channels, out_dtype=dtype, block_size=2))


@pytest.mark.parametrize("target", ["llvm", "vta"])
def test_other_backends_refuse(target):
    mod = Builder().build(lambda net: net.conv("a", net.quantize(net.x), 12, out_dtype="float32", block_size=2))
    with pytest.raises(CompileError, match=r"a: layers of backend .* do not rearrange pixels"):
        get_backend(target).lower(mod)
