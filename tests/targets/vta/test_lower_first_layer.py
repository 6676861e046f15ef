"""Packed first layers: fewer micro-operations, the same numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vta_graphs import GraphBuilder, host_reasons, tile_ops

from lpsn_tvm.schedules.vta.ops import Gemm
from lpsn_tvm.schedules.vta.placement import is_constant
from lpsn_tvm.targets.vta.config import PRESETS
from lpsn_tvm.targets.vta.layout import GatherLayout
from lpsn_tvm.targets.vta.lowering import lower_graph

CONFIGS = ["pynq", "pynq-4x8", "pynq-i4"]


@pytest.mark.parametrize("preset", CONFIGS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_first_convolutions(preset: str, data: st.DataObject) -> None:
    """Few channels, any geometry; 4-bit hardware reads images of 7 bits in two parts."""
    b = GraphBuilder(PRESETS[preset], data.draw(st.integers(0, 1000)))
    kernel = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    bits = data.draw(st.sampled_from([4, 7])) if preset == "pynq-i4" else 8
    extents = (data.draw(st.integers(kernel[0], 11)), data.draw(st.integers(kernel[1], 11)))
    x = b.input(data.draw(st.integers(1, 2)), data.draw(st.integers(1, 4)), *extents, bits=bits)
    padding = tuple(data.draw(st.integers(0, 3)) for _ in range(4))
    dilation = data.draw(st.sampled_from([1, 1, 1, 2])) if min(extents) >= 10 else 1
    y = b.conv2d(x, data.draw(st.integers(1, 20)), kernel, data.draw(st.integers(1, 3)), padding, dilation=dilation)
    network = b.check(b.dequantize(y))
    assert set(host_reasons(network)) <= {"x0.q", f"dequantize.{len(b.nodes) - 1}"}


def first_layer(preset: str, image: tuple[int, int, int], outputs: int, kernel: int, stride: int, padding: int) -> int:
    """Micro-operations of a first layer, its bias not counted."""
    b = GraphBuilder(PRESETS[preset])
    y = b.conv2d(b.input(1, *image), outputs, kernel, stride, padding)
    network = lower_graph(b.graph(b.dequantize(y)), b.config)
    op = tile_ops(network)[0]
    steps = tuple(step for step in op.steps if not (isinstance(step, Gemm) and is_constant(step)))
    return replace(op, steps=steps).micro_operations


def test_resnet_needs_a_quarter_of_the_taps() -> None:
    """7x7, stride 2, 3 channels: at most 12 micro-operations per output tile instead of 49."""
    assert first_layer("pynq", (3, 224, 224), 64, 7, 2, 3) <= 12 * 4 * 112 * 112


def test_small_kernels_of_one_channel_need_one_tap() -> None:
    assert first_layer("pynq", (1, 28, 28), 16, 3, 1, 1) == 28 * 28


@pytest.mark.parametrize("consumer", ["grouped", "transposed", "dense", "depthwise"])
def test_wide_inputs_of_other_layers_are_split_too(consumer: str) -> None:
    b = GraphBuilder(PRESETS["pynq-i4"])
    if consumer == "dense":
        y = b.dense(b.input(2, 20, bits=7), 12)
    else:
        x = b.input(1, 4, 6, 6, bits=7)
        y = {
            "grouped": lambda: b.conv2d(x, 8, groups=2),
            "depthwise": lambda: b.conv2d(x, 4, groups=4),
            "transposed": lambda: b.conv2d_transpose(x, 8, 3, 2, 1),
        }[consumer]()
    network = b.check(b.dequantize(y))
    assert len(tile_ops(network)) == 1


def test_operators_without_two_parts_read_wide_inputs_on_the_host() -> None:
    b = GraphBuilder(PRESETS["pynq-i4"])
    x = b.input(1, 4, 6, 6, bits=7)
    y = b.requantize(x, -3)
    network = b.check(b.dequantize(b.conv2d(y, 8)))
    assert "more than 4 bits" in host_reasons(network)[y]


def test_one_input_is_packed_for_each_reader() -> None:
    b = GraphBuilder(PRESETS["pynq"])
    x = b.input(1, 3, 9, 9)
    y, z = b.conv2d(x, 8, 3, 2), b.conv2d(x, 8, 5, 2)
    network = b.check(b.dequantize(b.sum(y, z)), b.dequantize(b.max_pool2d(x)))
    layouts = [tensor.layout for tensor in network.tensors.values() if tensor.value == x]
    assert len(layouts) == 3
    assert sum(isinstance(layout, GatherLayout) for layout in layouts) == 2
