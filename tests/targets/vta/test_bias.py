"""Biases as products with a constant tile: the same numbers as additions, wherever they fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vta_graphs import GraphBuilder, tile_ops

from lpsn_tvm.recipe import Recipe
from lpsn_tvm.schedules.vta.ops import Gemm, Step, Vector
from lpsn_tvm.schedules.vta.placement import is_constant
from lpsn_tvm.targets.vta import bias
from lpsn_tvm.targets.vta.backend import DEFAULT_MODEL, compile_network
from lpsn_tvm.targets.vta.config import PRESETS
from lpsn_tvm.targets.vta.execute import execute
from lpsn_tvm.targets.vta.forms import Array, Form
from lpsn_tvm.targets.vta.gemm import Rectangle
from lpsn_tvm.targets.vta.integer_graph import IntegerGraph
from lpsn_tvm.targets.vta.lower_context import Context
from lpsn_tvm.targets.vta.lowering import lower_graph
from lpsn_tvm.targets.vta.network import LoweredNetwork
from lpsn_tvm.targets.vta.weights import ConstantPool

CONFIGS = ["pynq", "pynq-4x8", "pynq-i8w4"]
LARGEST = {"pynq": 15 * 127 * 128, "pynq-i8w4": 14 * 7 * 128, "pynq-i4": 15 * 7 * 8}


def products(values: list[int], preset: str, tiles: tuple[int, int] = (16, 16)) -> tuple[list[Step], Array]:
    """The steps of a bias, and what they add per lane."""
    config = PRESETS[preset]
    context = Context(IntegerGraph((), (), ()), config, ConstantPool(config))
    result = Rectangle((1, len(values), *tiles), Form.plain(len(values), config.block_in), tiles)
    steps = bias.bias_steps(context, "layer", result, tiles, np.array(values))
    total = np.zeros(result.form.lanes, np.int64)
    for step in steps:
        if isinstance(step, Gemm):
            weights = context.pool.weights[step.weights].astype(np.int64)
            blocks = np.arange(result.form.lanes // config.block_out)
            total += (weights[blocks * step.output_stride] @ context.pool.data[step.source.region][0, 0]).reshape(-1)
    return steps, total[: len(values)]


@pytest.mark.parametrize("preset", list(LARGEST))
@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_products_are_the_bias(preset: str, data: st.DataObject) -> None:
    most = LARGEST[preset]
    values = data.draw(st.lists(st.integers(-most, most), min_size=2, max_size=40))
    values += [most, -most]
    steps, total = products(values, preset)
    assert [type(step) for step in steps] == [Gemm]
    np.testing.assert_array_equal(total, values)


@pytest.mark.parametrize("sign", [1, -1])
def test_what_does_not_fit_stays_a_vector(sign: int) -> None:
    for preset, most in LARGEST.items():
        steps, _ = products([0, sign * (most + PRESETS[preset].inp_depth)], preset)
        assert [type(step) for step in steps] == [Vector]


def test_few_positions_keep_the_vector() -> None:
    assert isinstance(products([1, 2], "pynq", (7, 7))[0][0], Vector)
    assert products([0, 0], "pynq")[0] == []


def constant_steps(network: LoweredNetwork) -> int:
    return sum(isinstance(step, Gemm) and is_constant(step) for op in tile_ops(network) for step in op.steps)


@pytest.mark.parametrize("preset", CONFIGS)
def test_layers_with_products(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed, pooled, narrow, residual, strided, grouped, transposed; several images; as programs, too."""
    monkeypatch.setattr(bias, "FEW_POSITIONS", 1)
    b = GraphBuilder(PRESETS[preset])
    x = b.max_pool2d(b.conv2d(b.input(2, 3, 16, 16), 7, 5))
    x = b.conv2d(b.conv2d(x, 40, 3), 20, 3, residual=b.conv2d(x, 20, 1), residual_multiplier=0.5)
    x = b.max_pool2d(b.conv2d(b.conv2d(x, 20, groups=20), 24, groups=2), 3, 2, 1)
    y = b.dequantize(b.conv2d_transpose(b.conv2d(x, 17, 3, 2, 1), 8, 3, 2, 1, 1))
    network = b.check(y)
    assert constant_steps(network) >= 5
    programs = compile_network(network, Recipe(search=False), DEFAULT_MODEL)
    found = execute(programs, {info.name: b.values[info.name] for info in b.inputs}).outputs
    np.testing.assert_array_equal(found[y], b.values[y])


def test_a_padded_convolution_of_many_positions_has_products() -> None:
    b = GraphBuilder(PRESETS["pynq"])
    network = b.check(b.dequantize(b.conv2d(b.conv2d(b.input(1, 5, 14, 14), 20, 1), 40)))
    assert constant_steps(network) == 2
    graph = b.graph(b.dequantize(b.nodes[-1].name))
    assert lower_graph(graph, PRESETS["pynq"]).data
