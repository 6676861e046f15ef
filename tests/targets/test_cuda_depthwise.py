"""A small network in the style of MobileNetV2, EfficientNet and ResNeXt, launch by launch in the emulation, on GPUs
with and without matrix instructions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_programs import run_module
from small_graphs import Net, random_feed, simple_plan
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.passes.canonicalize import canonicalize
from lpsn_tvm.passes.fuse_float import fuse_float
from lpsn_tvm.passes.lower_to_integer import lower_to_integer
from lpsn_tvm.reference import run_reference
from lpsn_tvm.targets.cuda import cuda_backend
from lpsn_tvm.targets.cuda_build import generate


def _relu6(net: Net, x: Any) -> Any:
    return net.emit(relax.op.clip(x, 0.0, 6.0))


def _inverted_residual(net: Net, x: Any, out: int, kernel: int, stride: int) -> Any:
    channels = graph.shape_of(x)[1]
    wide = _relu6(net, net.conv(x, 3 * channels, 1))
    deep = _relu6(net, net.conv(wide, 3 * channels, kernel, groups=3 * channels, strides=[stride, stride]))
    narrow = net.conv(deep, out, 1)
    return net.emit(relax.op.add(narrow, x)) if stride == 1 and out == channels else narrow


def _network(bits: int) -> Any:
    net = Net((2, 3, 17, 15))
    x = _relu6(net, net.conv(net.input, 16, strides=[2, 2]))
    x = _inverted_residual(net, x, 16, 3, 1)
    x = _inverted_residual(net, x, 24, 5, 2)
    x = _inverted_residual(net, x, 24, 7, 1)
    x = _relu6(net, net.conv(x, 24, groups=6))
    x = _relu6(net, net.conv(x, 48, groups=24))
    x = net.conv(x, 48, groups=6, strides=[2, 2])
    mod = canonicalize(net.module(x))
    return mod, fuse_float(lower_to_integer(mod, simple_plan(mod, bits, 8)))


@pytest.mark.parametrize("arch", [pytest.param("sm_61", marks=pytest.mark.slow), "sm_90"])
@pytest.mark.parametrize("bits", [pytest.param(4, marks=pytest.mark.slow), 8])
def test_mobile_networks_equal_the_reference(arch: str, bits: int) -> None:
    mod, lowered = _network(bits)
    feeds = random_feed(mod, 1)
    want = list(run_reference(lowered, feeds).values())
    got = run_module(cuda_backend({"kind": "cuda", "arch": arch}), lowered, feeds)
    for result, value in zip(got, want, strict=True):
        assert np.unique(value).size > 10
        np.testing.assert_array_equal(result, value)


@pytest.mark.parametrize("arch", ["sm_61", "sm_90"])
def test_every_layer_has_a_fast_kernel(arch: str) -> None:
    """The fallbacks are for what no network here has."""
    _, lowered = _network(8)
    source, plan = generate(cuda_backend({"kind": "cuda", "arch": arch}), lowered)
    names = {launch.kernel for launch in plan.launches}
    assert not [name for name in names if "direct" in name], names
    depthwise = [launch for launch in plan.launches if "depthwise" in launch.kernel]
    assert len(depthwise) == (4 if arch == "sm_90" else 5)
    is_dot, is_matrix = "dp4a" in source.source, "mma.sync" in source.source
    assert (is_dot, is_matrix) == (True, arch == "sm_90")
