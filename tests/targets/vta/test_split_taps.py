"""Windows beyond the buffers: their taps are cut, the sums stay exact; windows that fit stay whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
from vta_graphs import GraphBuilder, host_reasons, tile_ops
from vta_random import CONFIGS, programs_of
from vta_whole import assert_orders_agree

from lpsn_tvm.schedules.vta.ops import Gemm
from lpsn_tvm.schedules.vta.placement import reach
from lpsn_tvm.schedules.vta.reduction import tap_range
from lpsn_tvm.targets.vta.split_taps import split_taps


def check(b: GraphBuilder, y: str) -> list[list[Gemm]]:
    """Exact as lowered and as programs; the GEMM steps of every operator."""
    network = b.check(y)
    assert "global_avg_pool2d.2" not in host_reasons(network)
    feeds = {info.name: b.values[info.name] for info in b.inputs}
    assert_orders_agree(programs_of(b.graph(y), b.config), feeds, [b.values[y]], 2)
    ops = tile_ops(network)
    for op in ops:
        for index, step in enumerate(step for step in op.steps if isinstance(step, Gemm)):
            assert reach(op, index, 0, 1) * reach(op, index, 1, 1) <= b.config.inp_depth // 2
            assert tap_range(step.taps).count <= b.config.wgt_depth // 2
    return [[step for step in op.steps if isinstance(step, Gemm)] for op in ops]


@pytest.mark.parametrize(("preset", "pixels"), [("pynq", (46, 48)), ("small", (13, 20)), ("small-4x8", (9, 8))])
def test_averages_of_large_images(preset: str, pixels: tuple[int, int]) -> None:
    b = GraphBuilder(CONFIGS[preset])
    x = b.conv2d(b.input(1, 5, *pixels), 20, 1)
    parts = check(b, b.dequantize(b.global_avg_pool2d(x, 3)))[-1]
    assert len(parts) > 1
    assert sum(len(part.taps) for part in parts) == pixels[0] * pixels[1]


@pytest.mark.parametrize("groups", [1, 4])
def test_kernels_larger_than_the_weight_buffer(groups: int) -> None:
    b = GraphBuilder(CONFIGS["small"])
    x = b.conv2d(b.input(1, 5, 9, 10), 20, 1)
    y = b.conv2d(x, 8, (8, 7), padding=(3, 3, 4, 3), groups=groups, shifts=(10, 13))
    parts = check(b, b.dequantize(y))[-1]
    assert len(parts) > 1


def test_windows_that_fit_stay_whole() -> None:
    b = GraphBuilder(CONFIGS["pynq"])
    x = b.conv2d(b.input(1, 5, 9, 10), 20, 1)
    network = b.check(b.dequantize(b.conv2d(x, 40, 5)))
    for op in tile_ops(network):
        assert split_taps(op, b.config) is op
        tiny = replace(b.config, log_wgt_buff_size=11)
        assert len(split_taps(op, tiny).steps) >= len(op.steps)
