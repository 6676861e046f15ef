"""Sums, poolings, concatenations and moves on the accelerator against `quant`, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vta_graphs import GraphBuilder, extended, host_reasons, tile_ops

from lpsn_tvm.targets.vta.config import PRESETS

CONFIGS = ["pynq", "pynq-4x8", "pynq-i4"]


def start(preset: str, channels: int, *pixels: int, batch: int = 1, seed: int = 0) -> tuple[GraphBuilder, str]:
    """A graph whose first variable is on the accelerator."""
    b = GraphBuilder(PRESETS[preset], seed)
    return b, b.conv2d(b.input(batch, 5, *pixels), channels, 1)


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("exponents", [(0, 0), (0, -4), (2, -7), (8, 3), (-9, -11), (0, 20)])
def test_add(preset: str, exponents: tuple[int, int]) -> None:
    b, x = start(preset, 20, 5, 6, batch=2)
    y = b.conv2d(x, 20)
    b.check(b.dequantize(b.sum(x, y, exponents)), b.dequantize(b.sum(y, y, exponents)))


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("exponent", [-20, -8, -1, 0, 1, 7, 12])
def test_requantize(preset: str, exponent: int) -> None:
    b, x = start(preset, 20, 5, 6)
    b.check(b.dequantize(b.requantize(x, exponent)))


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "ceil"),
    [(2, 2, 0, False), (3, 2, 1, False), (3, 2, 0, True), (5, 1, 2, False), (7, 7, 0, False)],
)
def test_max_pool(preset: str, kernel: int, stride: int, padding: int, ceil: bool) -> None:
    b, x = start(preset, 20, 7, 8, batch=2)
    y = b.max_pool2d(x, kernel, stride, padding, ceil)
    b.check(b.dequantize(y), b.dequantize(x))


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("counts_padding", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "ceil"), [(2, 2, 0, False), (3, 2, 1, True), (3, 1, 1, False), (5, 3, 2, False)]
)
def test_avg_pool(preset: str, counts_padding: bool, kernel: int, stride: int, padding: int, ceil: bool) -> None:
    """Windows at the border count fewer pixels: rectangles of their own."""
    b, x = start(preset, 20, 7, 8)
    attrs = {"count_include_pad": counts_padding, "ceil_mode": ceil, "multiplier": 2.0}
    network = b.check(b.dequantize(b.avg_pool2d(x, kernel, stride, padding, **attrs)))
    assert not any("avg" in name for name in host_reasons(network))


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("exponent", [-3, 0, 4])
def test_global_avg_pool(preset: str, exponent: int) -> None:
    b, x = start(preset, 20, 7, 7, batch=2)
    b.check(b.dequantize(b.global_avg_pool2d(x, exponent)))


def test_dilated_pooling_runs_on_the_host() -> None:
    b, x = start("pynq", 20, 7, 7)
    attrs = {"kernel": (2, 2), "strides": (1, 1), "padding": (0,) * 4, "dilation": (2, 2), "ceil_mode": False}
    y = b.add("lpsn.max_pool2d", (x,), attrs)
    network = b.check(b.dequantize(b.conv2d(y, 8)))
    assert host_reasons(network)[y] == "its windows are dilated"


@pytest.mark.parametrize("preset", CONFIGS)
def test_aligned_concatenation_copies_nothing(preset: str) -> None:
    b, x = start(preset, 32, 4, 5, batch=2)
    y, z = b.conv2d(x, 16), b.conv2d(x, 16, 1)
    network = b.check(b.dequantize(b.conv2d(b.concat(y, z, x), 20)), b.dequantize(b.sum(y, z)))
    assert len(tile_ops(network)) == 5


@pytest.mark.parametrize("preset", CONFIGS)
def test_unaligned_concatenations_of_concatenations(preset: str) -> None:
    """Gaps in the lanes are the readers' business; what the host reads is gathered; scales differ."""
    b, x = start(preset, 10, 4, 5, batch=2)
    y, z = b.conv2d(x, 6), b.conv2d(x, 20, 1)
    first = b.concat(y, z, exponents=(0, -1))
    second = b.concat(first, x, y)
    w = b.conv2d(second, 12, groups=2)
    b.check(b.dequantize(w), b.dequantize(second), b.dequantize(b.sum(first, first)), b.dequantize(y))


@pytest.mark.parametrize("axis", [2, 3])
def test_concatenation_of_pixels(axis: int) -> None:
    b, x = start("pynq", 20, 4, 5)
    y = b.conv2d(x, 20)
    b.check(b.dequantize(b.concat(x, y, x, axis=axis, exponents=(0, 1, -2))))


@pytest.mark.parametrize("preset", CONFIGS)
def test_resize_and_pad(preset: str) -> None:
    b, x = start(preset, 20, 3, 4, batch=2)
    network = b.check(b.dequantize(b.pad(b.resize(x, 3), 1, 0, 2, 3)))
    assert len(tile_ops(network)) == 3


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("mode", ["reflect", "edge"])
def test_other_resizes_and_pads_copy_run_by_run(preset: str, mode: str) -> None:
    b, x = start(preset, 16, 4, 4, batch=2)
    y = b.add("lpsn.resize_nearest", (x,), {"rows": (0, 1, 1, 3), "columns": (3, 0, 1, 2, 2)})
    z = b.add("lpsn.pad", (y,), {"pad_width": (3, 1, 0, 2), "value": 0, "mode": mode})
    deep = b.depth_to_space(z, 2)
    w = b.add("lpsn.pad", (deep,), {"pad_width": (1, 1, 1, 1), "value": 0, "mode": mode})
    network = b.check(b.dequantize(b.conv2d(w, 8)), b.dequantize(z))
    assert set(host_reasons(network)) <= {"x0.q", *(node.name for node in b.nodes if node.op == "lpsn.dequantize")}


def test_resizes_of_many_runs_are_the_hosts() -> None:
    b, x = start("pynq", 16, 14, 14)
    rows = tuple(reversed(range(14)))
    z = b.add("lpsn.resize_nearest", (x,), {"rows": rows, "columns": rows})
    assert "places" in host_reasons(b.check(b.dequantize(b.conv2d(z, 8))))[z]


@pytest.mark.parametrize("preset", CONFIGS)
def test_channel_shuffle_is_another_reading(preset: str) -> None:
    b, x = start(preset, 24, 4, 5)
    y = b.add("lpsn.transpose", (b.reshape(x, 1, 3, 8, 4, 5),), {"axes": (0, 2, 1, 3, 4)})
    z = b.reshape(y, 1, 24, 4, 5)
    network = b.check(b.dequantize(b.conv2d(z, 8)), b.dequantize(b.sum(z, z)), b.dequantize(b.conv2d(z, 24, groups=24)))
    assert not {y, z} & set(host_reasons(network))


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize(
    "cut", [(1, 3, 19, 1), (1, 16, 32, 1), (1, 1, 40, 3), (2, 1, 6, 2), (3, 2, 5, 1), (3, 0, 6, 2)]
)
def test_slices(preset: str, cut: tuple[int, int, int, int]) -> None:
    """Read by a layer, a sum and the host."""
    b, x = start(preset, 40, 6, 6, batch=2)
    y = b.slice(x, *cut)
    b.check(b.dequantize(b.conv2d(y, 12)), b.dequantize(b.sum(y, y)), b.dequantize(y))


@pytest.mark.parametrize("preset", CONFIGS)
@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space_is_another_reading(preset: str, mode: str) -> None:
    """A convolution behind it, a strided one, a pooling, a sum, a second one."""
    b, x = start(preset, 36, 4, 5)
    y = b.depth_to_space(x, 2, mode)
    strided = b.conv2d(y, 8, 2, 2, 0)
    twice = b.conv2d(b.depth_to_space(b.slice(y, 1, 0, 8), 2, mode), 4)
    network = b.check(*(b.dequantize(v) for v in (b.conv2d(y, 12), strided, b.max_pool2d(y), b.sum(y, y), twice, y)))
    strided_op = next(op for op in tile_ops(network) if op.name == strided)
    assert strided_op.micro_operations == 4 * 5 * -(-36 // b.config.block_in)


def test_depth_to_space_at_the_end_runs_on_the_host() -> None:
    b, x = start("pynq", 9, 4, 5)
    y = b.depth_to_space(x, 3)
    network = b.check(b.dequantize(y))
    assert "moves no data" in host_reasons(network)[y]
    assert len(tile_ops(network)) == 1


@pytest.mark.parametrize("preset", CONFIGS)
def test_flattened_concatenation_with_gaps(preset: str) -> None:
    b, x = start(preset, 6, 3, 4, batch=2)
    y = b.concat(x, b.conv2d(x, 10))
    flat = b.reshape(y, 2, 16 * 12)
    b.check(b.dense(flat, 10, out_dtype="float32"), b.dequantize(b.sum(flat, flat)), b.dequantize(flat))


def test_reshapes_that_mix_axes_run_on_the_host() -> None:
    b, x = start("pynq", 16, 4, 4)
    y = b.reshape(x, 1, 4, 8, 8)
    z = b.add("lpsn.transpose", (y,), {"axes": (0, 1, 3, 2)})
    reasons = host_reasons(b.check(b.dequantize(b.conv2d(z, 8)), b.dequantize(b.reshape(x, 1, 16, 1, 16))))
    assert set(reasons) >= {y, z}


def test_tables_and_products_run_on_the_host() -> None:
    b, x = start("pynq", 20, 4, 4)
    table = np.arange(-128, 128).astype(np.int8)[::-1].copy()
    y = b.add("lpsn.lookup", (x, table), {"qmin": -128})
    reasons = host_reasons(b.check(b.dequantize(b.conv2d(y, 20, residual=y, residual_multiplier=1.0))))
    assert reasons[y] == "the accelerator has no tables"


def test_equal_constants_exist_once() -> None:
    b, x = start("pynq", 32, 6, 6)
    y = b.sum(b.max_pool2d(x), b.avg_pool2d(b.sum(x, x), 2, 2))
    network = b.check(b.dequantize(y))
    assert sum(name.startswith("identity.1") for name in network.weights) == 1


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_random_graphs(data: st.DataObject) -> None:
    """Operators in any order, read by any number of others; every variable is compared."""
    b, x = start(data.draw(st.sampled_from(CONFIGS)), 12, 5, 6, batch=2, seed=data.draw(st.integers(0, 1000)))
    pool = [x, b.conv2d(x, 20)]
    for _ in range(data.draw(st.integers(3, 8))):
        pool.append(extended(b, pool, data))
    ends = data.draw(st.sets(st.sampled_from(pool), min_size=1, max_size=3)) | {pool[-1]}
    b.check(*(b.dequantize(name) for name in sorted(ends)))
