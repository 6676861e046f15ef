"""Modules of integer operators as records, and through `lower`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from vta_lowered import run_lowered

from lpsn_tvm import graph, quant
from lpsn_tvm.errors import CompileError
from lpsn_tvm.passes.integer_ops import integer_call
from lpsn_tvm.schedules.vta.ops import TileOp
from lpsn_tvm.targets.vta.config import PRESETS
from lpsn_tvm.targets.vta.integer_graph import read_graph
from lpsn_tvm.targets.vta.lowering import lower

CLAMP = {"qmin": -128, "qmax": 127, "out_dtype": "int8", "out_zero_point": 0}


def module(*, is_unknown: bool = False, two_outputs: bool = False) -> tvm.IRModule:
    """quantize, convolution (twice the same variable as input and residual), a second name for it, dequantize."""
    rng = np.random.default_rng(0)
    x = relax.Var("x", relax.TensorType((1, 5, 6, 6), "float32"))
    builder = relax.BlockBuilder()

    def emit(name: str, op: str, tensors: list[Any], **attrs: Any) -> Any:
        return graph.emit_named(builder, integer_call(op, tensors, attrs), name)

    with builder.function("main", [x]):
        with builder.dataflow():
            limits = {"qmin": -128, "qmax": 127, "out_dtype": "int8", "zero_point": 0}
            q = emit("x.q", "lpsn.quantize", [x], inv_scale=32.0, scale=1 / 32, **limits)
            constants = [
                graph.constant(rng.integers(-128, 128, (5, 5, 3, 3)).astype(np.int8)),
                graph.constant(rng.integers(-99, 99, 5).astype(np.int32)),
                graph.constant(np.exp2(-np.arange(6, 11)).astype(np.float32)),
            ]
            geometry = {"strides": (1, 1), "padding": (1, 1, 1, 1), "rounding": "half_up", "residual_multiplier": 1.0}
            y = emit("conv", "lpsn.conv2d", [q, *constants, q], **geometry, **CLAMP)
            alias = graph.emit_named(builder, y, "again")
            value = graph.emit_named(builder, relax.op.cumsum(x, axis=1), "sums") if is_unknown else x
            out = emit("out", "lpsn.dequantize", [alias], scale=0.5, zero_point=0)
            result = builder.emit_output(relax.Tuple([out, value]) if two_outputs or is_unknown else out)
        builder.emit_func_output(result)
    return builder.get()


def test_records_keep_names_operands_and_attributes() -> None:
    read = read_graph(module())
    assert [(node.name, node.op) for node in read.nodes] == [
        ("x.q", "lpsn.quantize"),
        ("conv", "lpsn.conv2d"),
        ("out", "lpsn.dequantize"),
    ]
    conv = read.nodes[1]
    assert conv.variables == ("x.q", "x.q") and conv.variable(4) == "x.q"
    assert conv.constant(1).shape == (5, 5, 3, 3)
    assert tuple(conv.attrs["padding"]) == (1, 1, 1, 1)
    assert read.nodes[2].variables == ("conv",), "the second name is the first"
    assert read.outputs == ("out",)
    assert [info.name for info in read.inputs] == ["x"]
    assert [node.name for node in read.consumers["x.q"]] == ["conv"]


def test_several_outputs() -> None:
    assert read_graph(module(two_outputs=True)).outputs == ("out", "x")


def test_unknown_operators_are_named() -> None:
    with pytest.raises(CompileError, match=r"sums.*relax\.cumsum"):
        read_graph(module(is_unknown=True))


def test_wrong_kinds_of_operands_are_named() -> None:
    conv = read_graph(module()).nodes[1]
    with pytest.raises(CompileError, match=r"conv: operand 1 .* constant"):
        conv.variable(1)
    with pytest.raises(CompileError, match=r"conv: operand 0 .* not a constant"):
        conv.constant(0)


@pytest.mark.parametrize("preset", ["pynq", "pynq-4x8"])
def test_a_module_runs(preset: str) -> None:
    read = read_graph(module())
    network = lower(module(), PRESETS[preset])
    values: dict[str, Any] = {"x": np.random.default_rng(1).normal(0, 2, (1, 5, 6, 6)).astype(np.float32)}
    for node in read.nodes:
        operands = [values[o] if isinstance(o, str) else o for o in node.operands]
        values[node.name] = quant.OPERATORS[node.op](*operands, **node.attrs)
    np.testing.assert_array_equal(run_lowered(network, {"x": values["x"]})["out"], values["out"])
    assert [op.name for op in network.steps if isinstance(op, TileOp)] == ["conv"]
