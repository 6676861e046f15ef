"""Weighted layers on the accelerator against `quant`, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vta_graphs import GraphBuilder, host_reasons, tile_ops

from lpsn_tvm.errors import CompileError
from lpsn_tvm.schedules.vta.ops import Gemm, Pool, Scalar, Store, Vector
from lpsn_tvm.targets.vta.config import PRESETS
from lpsn_tvm.targets.vta.lowering import lower_graph

CONFIGS = ["pynq", "pynq-4x8", "pynq-i4", "pynq-i8w4"]
EVERY = settings(max_examples=12, deadline=None, derandomize=True)


def builder(preset: str, seed: int = 0) -> GraphBuilder:
    return GraphBuilder(PRESETS[preset], seed)


@pytest.mark.parametrize("preset", CONFIGS)
@EVERY
@given(st.data())
def test_convolutions(preset: str, data: st.DataObject) -> None:
    """Any kernel, stride, dilation, padding, groups, batch; behind another layer, so that nothing is packed."""
    b = builder(preset, data.draw(st.integers(0, 1000)))
    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    channels, outputs = (groups * data.draw(st.integers(1, 12)) for _ in range(2))
    height, width = data.draw(st.integers(3, 9)), data.draw(st.integers(3, 9))
    x = b.conv2d(b.input(data.draw(st.integers(1, 5)), 5, height, width), channels, 1)
    kernel = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    dilation = data.draw(st.integers(1, 2))
    needed = [max(0, dilation * (k - 1) + 1 - e) for k, e in zip(kernel, (height, width), strict=True)]
    top, left, bottom, right = (data.draw(st.integers(needed[i % 2], needed[i % 2] + 2)) for i in range(4))
    y = b.conv2d(
        x, outputs, kernel, data.draw(st.integers(1, 3)), (top, left, bottom, right), groups, dilation, (0, 20)
    )
    b.check(b.dequantize(y))


@pytest.mark.parametrize("preset", CONFIGS)
@EVERY
@given(st.data())
def test_transposed_convolutions(preset: str, data: st.DataObject) -> None:
    b = builder(preset, data.draw(st.integers(0, 1000)))
    groups = data.draw(st.sampled_from([1, 1, 2, 4]))
    channels, outputs = (groups * data.draw(st.integers(1, 6)) for _ in range(2))
    x = b.conv2d(b.input(2, 5, data.draw(st.integers(2, 6)), data.draw(st.integers(2, 6))), channels, 1)
    kernel, stride = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    padding = data.draw(st.integers(0, min(1, kernel - 1)))
    y = b.conv2d_transpose(x, outputs, kernel, stride, padding, data.draw(st.integers(0, stride - 1)), groups)
    b.check(b.dequantize(y))


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("shifts", [(6, 9), (7, 7), (14, 17)], ids=["vector", "scalar", "split"])
@pytest.mark.parametrize("exponent", [0, 2, -3])
def test_residual_of_another_scale(preset: str, shifts: tuple[int, int], exponent: int) -> None:
    """Channels whose accumulators drop bits before the residual is added, and channels that do not."""
    b = builder(preset)
    x = b.conv2d(b.input(1, 5, 4, 5), 20)
    y = b.conv2d(
        x, 20, shifts=shifts, residual=x, residual_multiplier=2.0**exponent, residual_shift=b.config.wgt_bits - 2
    )
    b.check(b.dequantize(y))


def test_residual_beyond_a_weight_is_added_several_times() -> None:
    """A scheme that asks for 2**6 on 4-bit weights."""
    b = builder("pynq-i4")
    x = b.conv2d(b.input(1, 5, 4, 4), 20)
    y = b.conv2d(x, 20, shifts=(0, 9), residual=x, residual_multiplier=1.0, residual_shift=6)
    network = b.check(b.dequantize(y))
    passes = [step.passes for step in tile_ops(network)[-1].steps if isinstance(step, Gemm)]
    assert max(passes) == 16


@pytest.mark.parametrize("preset", CONFIGS)
def test_depthwise_takes_one_tile_per_block(preset: str) -> None:
    b = builder(preset)
    x = b.conv2d(b.input(1, 5, 6, 6), 40, 1)
    network = b.check(b.dequantize(b.conv2d(x, 40, groups=40)))
    gemm = next(step for step in tile_ops(network)[-1].steps if isinstance(step, Gemm))
    assert gemm.fan_in == 1
    assert gemm.first_input == tuple(range(-(-40 // b.config.block_in)))


def test_small_groups_share_blocks() -> None:
    """8 groups of 4 channels: two blocks, each reads itself."""
    b = builder("pynq")
    x = b.conv2d(b.input(1, 5, 6, 6), 32, 1)
    network = b.check(b.dequantize(b.conv2d(x, 32, groups=8)))
    gemm = next(step for step in tile_ops(network)[-1].steps if isinstance(step, Gemm))
    assert (gemm.fan_in, gemm.first_input) == (1, (0, 1))


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("pixels", [(1, 1), (4, 3)], ids=["vector", "flattened"])
def test_dense_reads_tiles_where_they_lie(preset: str, pixels: tuple[int, int]) -> None:
    """Flatten moves nothing: its weights are permuted. 10 classes leave as float32."""
    b = builder(preset)
    x = b.conv2d(b.input(3, 5, *pixels), 20, 1)
    flat = b.reshape(x, 3, 20 * pixels[0] * pixels[1])
    network = b.check(b.dense(b.dense(flat, 17), 10, out_dtype="float32"))
    assert len(tile_ops(network)) == 3
    assert [op for op in host_reasons(network) if "reshape" in op] == []


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("outputs", [3, 40])
def test_float_results_leave_in_planes(preset: str, outputs: int) -> None:
    """As many planes as the range of the accumulators needs."""
    b = builder(preset)
    x = b.conv2d(b.input(2, 5, 4, 4), 20, 1)
    network = b.check(b.conv2d(x, outputs, out_dtype="float32"))
    stores = [step for step in tile_ops(network)[-1].steps if isinstance(step, Store)]
    weights = 20 * 9 << (b.config.wgt_bits - 1)
    needed = (weights << (b.config.inp_bits - 1)).bit_length() + 1
    assert 2 <= len(stores) <= -(-needed // b.config.out_bits)


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1)])
def test_pooling_behind_a_layer_runs_on_its_accumulators(preset: str, kernel: int, stride: int, padding: int) -> None:
    b = builder(preset)
    x = b.conv2d(b.input(1, 5, 7, 8), 20, 1)
    layer = b.conv2d(x, 24, shifts=(5, 8), qmin=0)
    network = b.check(b.dequantize(b.max_pool2d(layer, kernel, stride, padding)))
    steps = tile_ops(network)[-1].steps
    kinds = [type(step) for step in steps]
    assert len(tile_ops(network)) == 2
    assert kinds.index(Pool) < max(i for i, step in enumerate(steps) if getattr(step, "kind", "") == "shr")


def test_pooling_of_a_layer_that_others_read_stays_apart() -> None:
    b = builder("pynq")
    layer = b.conv2d(b.conv2d(b.input(1, 5, 8, 8), 20, 1), 20)
    b.check(b.dequantize(b.max_pool2d(layer)), b.dequantize(layer))


def test_only_what_values_need_is_emitted() -> None:
    """One amount for all channels is an immediate; a clamp that cannot bite is left out."""
    b = builder("pynq")
    x = b.conv2d(b.input(1, 5, 4, 4), 16, 1, qmin=0)
    y = b.conv2d(x, 16, 1, shifts=(6, 6))
    kinds = [(type(step), getattr(step, "kind", None)) for step in tile_ops(b.check(b.dequantize(y)))[-1].steps]
    # 16 products of at most 127 * 128 are below 2**18 in magnitude: >> 6 may leave int8 on both sides, >> 14 cannot.
    assert kinds[1:-1] == [(Vector, "add"), (Scalar, "shr"), (Scalar, "max"), (Scalar, "min")]
    z = b.conv2d(x, 16, 1, shifts=(14, 14))
    kinds = [(type(step), getattr(step, "kind", None)) for step in tile_ops(b.check(b.dequantize(z)))[-1].steps]
    assert kinds[1:-1] == [(Vector, "add"), (Scalar, "shr")]


def test_weights_too_wide_run_on_the_host() -> None:
    b = builder("pynq-i8w4")
    x = b.conv2d(b.input(1, 5, 4, 4), 20, 1)
    y = b.conv2d(x, 8)
    wide = np.full(b.nodes[-1].constant(1).shape, 100, np.int8)
    node = b.nodes.pop()
    y = b.add(node.op, (x, wide, *node.operands[2:]), dict(node.attrs))
    network = b.check(b.dequantize(y))
    assert "do not fit 4 bits" in host_reasons(network)[y]


def test_float_rounding_runs_on_the_host() -> None:
    b = builder("pynq")
    y = b.conv2d(b.conv2d(b.input(1, 5, 4, 4), 20, 1), 8, rounding="half_even")
    assert "not by a shift" in host_reasons(b.check(b.dequantize(y)))[y]


def test_scales_that_are_no_powers_of_two_are_an_error() -> None:
    b = builder("pynq")
    x = b.conv2d(b.input(1, 5, 4, 4), 20, 1)
    y = b.conv2d(x, 8)
    node = b.nodes.pop()
    operands = (*node.operands[:3], np.full(8, 0.3, np.float32))
    b.nodes.append(type(node)(y, node.op, operands, node.attrs, node.shape))
    with pytest.raises(CompileError, match=f"{y}.*powers of two"):
        lower_graph(b.graph(y), b.config)
