"""Everything that lowering emits, as programs on the strict simulator."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vta_graphs import GraphBuilder, extended

from lpsn_tvm.recipe import Recipe
from lpsn_tvm.targets.vta.backend import DEFAULT_MODEL, compile_network
from lpsn_tvm.targets.vta.config import PRESETS
from lpsn_tvm.targets.vta.execute import execute
from lpsn_tvm.targets.vta.lowering import lower_graph

CONFIGS = ["pynq", "pynq-4x8", "pynq-i4", "pynq-i8w4"]


def simulated(b: GraphBuilder, *outputs: str) -> None:
    """Every output equals `quant`."""
    network = lower_graph(b.graph(*outputs), b.config)
    programs = compile_network(network, Recipe(search=False), DEFAULT_MODEL)
    found = execute(programs, {info.name: b.values[info.name] for info in b.inputs}).outputs
    for name in outputs:
        np.testing.assert_array_equal(found[name], b.values[name], err_msg=name)


@pytest.mark.parametrize("preset", CONFIGS)
def test_layers(preset: str) -> None:
    """Packed, narrow, residual, grouped, depthwise, dilated, transposed, pooled, flattened, float."""
    b = GraphBuilder(PRESETS[preset])
    x = b.max_pool2d(b.conv2d(b.input(2, 3, 16, 16), 7, 5))
    x = b.conv2d(b.conv2d(x, 20, 3), 20, 3, residual=b.conv2d(x, 20, 1), residual_multiplier=0.5)
    x = b.max_pool2d(b.conv2d(b.conv2d(x, 20, groups=20), 24, groups=2), 3, 2, 1)
    x = b.conv2d_transpose(b.conv2d(x, 17, 3, 1, 2, dilation=2), 8, 3, 2, 1, 1)
    b.reshape(x, 2, 8 * 8 * 8)
    simulated(b, b.dense(b.dense(b.nodes[-1].name, 20), 10, out_dtype="float32"), b.dequantize(x))


@pytest.mark.parametrize("preset", CONFIGS)
def test_other_operators(preset: str) -> None:
    """Sums and concatenations of different scales, poolings, moves, forms that the host reads."""
    b = GraphBuilder(PRESETS[preset])
    x = b.conv2d(b.input(2, 5, 6, 7), 12, 1)
    y = b.conv2d(x, 20)
    z = b.concat(x, b.requantize(b.slice(y, 1, 4, 20), -2), b.sum(x, x, (3, -5)), exponents=(0, -1, 0))
    pooled = b.avg_pool2d(b.max_pool2d(z, 3, 1, 1), 3, 2, 1, count_include_pad=True)
    padded = b.add("lpsn.pad", (b.resize(pooled, 2),), {"pad_width": (2, 0, 1, 1), "value": 0, "mode": "reflect"})
    shuffled = b.depth_to_space(b.slice(z, 3, 1, 6), 2)
    ends = (b.global_avg_pool2d(padded), shuffled, b.conv2d(shuffled, 6), b.pad(padded, 0, 1, 2, 0), z)
    simulated(b, *(b.dequantize(end) for end in ends))


@pytest.mark.parametrize("preset", ["pynq", "pynq-i4"])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_random_graphs(preset: str, data: st.DataObject) -> None:
    b = GraphBuilder(PRESETS[preset], data.draw(st.integers(0, 1000)))
    x = b.conv2d(b.input(1, 5, 5, 6), 12, 1)
    pool = [x, b.conv2d(x, 20)]
    for _ in range(5):
        pool.append(extended(b, pool, data))
    simulated(b, *(b.dequantize(name) for name in dict.fromkeys(pool[2:])))
