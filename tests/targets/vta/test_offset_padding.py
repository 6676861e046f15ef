"""Convolutions whose padding holds a number that is not zero: exact, on the accelerator, and cheap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vta_graphs import GraphBuilder, host_reasons, tile_ops
from vta_lowered import run_lowered
from vta_whole import assert_whole_network_is_exact, build_with_graph, host_layers

from lpsn_tvm import graph
from lpsn_tvm.recipe import Recipe
from lpsn_tvm.schedules.vta.ops import Gemm, TileOp
from lpsn_tvm.targets.vta.backend import DEFAULT_MODEL, compile_network
from lpsn_tvm.targets.vta.config import PRESETS
from lpsn_tvm.targets.vta.execute import execute
from lpsn_tvm.targets.vta.lowering import lower_graph
from lpsn_tvm.targets.vta.scheme import vta_scheme

CONFIGS = ["pynq", "pynq-4x8", "pynq-i4", "pynq-i8w4"]


def checked(b: GraphBuilder, *outputs: str, only: str | None = None) -> list[TileOp]:
    """The operators: in numpy and as a program on the strict simulator equal to `quant`; `only` is no host's work."""
    network = b.check(*outputs)
    assert only is None or only not in host_reasons(network)
    feeds = {info.name: b.values[info.name] for info in b.inputs}
    found = execute(compile_network(network, Recipe(search=False), DEFAULT_MODEL), feeds).outputs
    for name in outputs:
        np.testing.assert_array_equal(found[name], b.values[name], err_msg=name)
    return tile_ops(network)


@pytest.mark.parametrize("preset", CONFIGS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_any_geometry(preset: str, data: st.DataObject) -> None:
    """Any kernel, stride, dilation, padding, groups, depthwise, batch, value."""
    b = GraphBuilder(PRESETS[preset], data.draw(st.integers(0, 1000)))
    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    channels, outputs = (groups * data.draw(st.integers(1, 12)) for _ in range(2))
    if data.draw(st.booleans()):
        groups = outputs = channels
    height, width = data.draw(st.integers(3, 9)), data.draw(st.integers(3, 9))
    x = b.conv2d(b.input(data.draw(st.integers(1, 5)), 5, height, width), channels, 1)
    kernel = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    dilation = data.draw(st.integers(1, 2))
    needed = [max(0, dilation * (k - 1) + 1 - e) for k, e in zip(kernel, (height, width), strict=True)]
    padding = tuple(data.draw(st.integers(needed[i % 2], needed[i % 2] + 2)) for i in range(4))
    value = data.draw(st.sampled_from([-b.limit, -b.limit // 2, -1, b.limit - 1]))
    stride = data.draw(st.integers(1, 3))
    y = b.conv2d(x, outputs, kernel, stride, padding, groups, dilation, (0, 20), x_zero_point=value)
    checked(b, b.dequantize(y), only=y)


@pytest.mark.parametrize("preset", CONFIGS)
def test_with_everything_that_is_fused(preset: str) -> None:
    """Pooling, residual, float32 results, a packed image in front, narrow neighbours on either side."""
    b = GraphBuilder(PRESETS[preset])
    x = b.conv2d(b.input(2, 1, 16, 16), 6, 5, qmin=-b.limit, x_zero_point=-b.limit)
    x = b.max_pool2d(b.conv2d(x, 20, 3, qmin=-b.limit, x_zero_point=-b.limit), 3, 2, 1)
    x = b.conv2d(x, 20, 3, residual=x, residual_multiplier=0.5, x_zero_point=-b.limit)
    y = b.conv2d(x, 10, 3, x_zero_point=3, out_dtype="float32")
    assert len(checked(b, y, b.dequantize(x))) == 4


@pytest.mark.parametrize("preset", CONFIGS)
def test_an_image_in_two_parts(preset: str) -> None:
    """What padding adds is not doubled with the high part."""
    b = GraphBuilder(PRESETS[preset])
    bits = 7 if b.config.inp_bits == 4 else 8
    y = b.conv2d(b.input(1, 3, 9, 7, bits=bits), 20, 3, 2, x_zero_point=-(1 << (bits - 1)))
    checked(b, b.dequantize(y), only=y)


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("value", [-8, 7])
def test_pad(preset: str, value: int) -> None:
    b = GraphBuilder(PRESETS[preset])
    x = b.conv2d(b.input(2, 5, 4, 5), 20, 1)
    attrs = {"pad_width": (1, 0, 2, 3), "value": value, "mode": "constant"}
    y = b.add("lpsn.pad", (x,), attrs)
    checked(b, b.dequantize(y), b.dequantize(b.conv2d(y, 6, x_zero_point=-1)), only=y)


def padding_gemms(op: TileOp) -> list[Gemm]:
    return [step for step in op.steps if isinstance(step, Gemm) and step.source.region.endswith(".padding")]


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize(("channels", "groups"), [(64, 1), (64, 64)], ids=["dense", "depthwise"])
def test_costs_little(preset: str, channels: int, groups: int) -> None:
    """One or a few micro-operations per border position; classes share weight tiles."""
    b = GraphBuilder(PRESETS[preset])
    x = b.conv2d(b.input(1, 5, 14, 14), channels, 1)
    y = b.conv2d(x, channels, 3, groups=groups, x_zero_point=-b.limit)
    op = checked(b, b.dequantize(y), only=y)[-1]
    (step,), blocks = padding_gemms(op), channels // b.config.block_out
    positions = sum(tap.dst_y.count * tap.dst_x.count for tap in step.taps)
    lanes = len({tap.weight for tap in step.taps}) * b.config.block_in
    border = 4 * 13
    if groups > 1:
        assert positions <= border
        assert lanes <= 80
    else:
        # Random weights: sums are large. Visiting the missing taps would take 164 for each of the input blocks.
        assert positions <= 4 * border * 16 / b.config.block_in < 164 * blocks
    assert step.fan_in == 1


@pytest.mark.parametrize(("padding", "value"), [(1, 0), (0, -8)])
def test_nothing_is_added_for_nothing(padding: int, value: int) -> None:
    b = GraphBuilder(PRESETS["pynq-i4"])
    x = b.conv2d(b.input(1, 5, 6, 6), 20, 1)
    y = b.conv2d(x, 20, 3, padding=padding, x_zero_point=value)
    assert padding_gemms(checked(b, b.dequantize(y), only=y)[-1]) == []


def test_missing_constants_are_noticed() -> None:
    """The check itself: other constants give other numbers."""
    b = GraphBuilder(PRESETS["pynq-i4"])
    x = b.conv2d(b.input(1, 5, 6, 6), 20, 1)
    y = b.conv2d(x, 20, 3, x_zero_point=-8)
    network = lower_graph(b.graph(y), b.config)
    for tiles in network.data.values():
        tiles[:] = 0
    found = run_lowered(network, {info.name: b.values[info.name] for info in b.inputs})[y]
    assert np.any(found != b.values[y])
    np.testing.assert_array_equal(found[:, :, 1:-1, 1:-1], b.values[y][:, :, 1:-1, 1:-1])


@pytest.mark.parametrize(
    ("preset", "bits", "offset"), [("pynq-i4", None, True), ("pynq", None, False), ("pynq", (4, 4), True)]
)
def test_the_scheme_asks_for_it_where_bits_are_few(preset: str, bits: tuple[int, int] | None, offset: bool) -> None:
    assert vta_scheme(PRESETS[preset], bits).has_activation_offset is offset


@pytest.mark.slow
def test_a_network_keeps_its_layers_on_the_accelerator() -> None:
    """From ONNX, 4 bits: layers behind a ReLU pad with the offset, and nothing but the borders runs on the host."""
    from benchmarks.models import unet

    calibration = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    module, mod = build_with_graph(unet(size=16, base=8), bits=4, calibration=calibration)
    calls = [graph.call_attrs(call) for _, call in graph.bindings(mod) if graph.op_name(call) == "lpsn.conv2d"]
    assert any(attrs.get("x_zero_point") for attrs in calls)
    assert {op for op, _ in host_layers(module).values()} == {"lpsn.quantize", "vta.scale"}
    assert_whole_network_is_exact(module, mod, interleavings=1)
