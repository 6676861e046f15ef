"""Tables move into the layers before them: a golden module, what stays apart, and results that do not change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from integer_network import Builder
from tvm import relax

from lpsn_tvm import graph, quant
from lpsn_tvm.errors import CompileError
from lpsn_tvm.passes.fuse_tables import fuse_tables
from lpsn_tvm.passes.integer_ops import integer_call
from lpsn_tvm.reference import run_reference
from lpsn_tvm.targets import get_backend

TABLES = np.random.default_rng(5)
BYTES = TABLES.integers(0, 256, 256).astype(np.uint8)
SIGNED = TABLES.integers(-128, 128, 256).astype(np.int8)


def looked_up(
    net: Builder, name: str, x: Any, table: np.ndarray = BYTES, op: str = "lpsn.lookup", qmin: int = 0
) -> Any:
    return net.emit(name, op, [x, graph.constant(table)], qmin=qmin)


def dense(net: Builder, name: str, x: Any, out: int) -> Any:
    width = graph.shape_of(x)[1]
    constants = [
        net.rng.integers(-128, 128, (width, out)).astype(np.int8),
        net.rng.integers(-500, 500, out).astype(np.int32),
        np.full(out, 2e-4, np.float32),
    ]
    return net.emit(name, "lpsn.dense", [x, *map(graph.constant, constants)], x_zero_point=110, out_zero_point=110)


def operators(mod: Any) -> list[str]:
    return [graph.op_name(value) for _, value in graph.bindings(mod) if isinstance(value, relax.Call)]


def assert_same_results(before: Any, after: Any) -> None:
    feeds = {
        p.name: np.random.default_rng(7).standard_normal(graph.shape_of(p)).astype(np.float32)
        for p in before["main"].params
    }
    wanted, got = run_reference(before, feeds), run_reference(after, feeds)
    assert list(got) == list(wanted)
    for want, have in zip(wanted.values(), got.values(), strict=True):
        assert (have.dtype, have.shape) == (want.dtype, want.shape)
        assert want.min() < want.max()
        np.testing.assert_array_equal(have, want)


def test_golden() -> None:
    def before(net: Builder) -> Any:
        a = looked_up(net, "act", net.conv("conv", net.quantize(net.x), 8, qmin=20, qmax=200))
        b = looked_up(net, "sum.act", net.conv("sum", a, 8, residual=a), BYTES[::-1])
        b = looked_up(net, "signed.act", net.conv("signed", b, 8), SIGNED)
        return net.conv("head", b, 4, kernel=1, out_dtype="float32")

    def expected(net: Builder) -> Any:
        # One entry for every integer that the layer's clamp leaves.
        a = net.conv("act", net.quantize(net.x), 8, qmin=20, qmax=200, table=BYTES[20:201].tolist())
        b = net.conv("sum.act", a, 8, residual=a, table=BYTES[::-1].tolist())
        b = net.conv("signed.act", b, 8, table=SIGNED.tolist(), out_dtype="int8")
        return net.conv("head", b, 4, kernel=1, out_dtype="float32")

    mod = Builder().build(before)
    after = fuse_tables(mod)
    tvm.ir.assert_structural_equal(after, Builder().build(expected))
    assert [var.name for var, _ in graph.bindings(after)] == ["q", "act", "sum.act", "signed.act", "head", "gv"]
    assert_same_results(mod, after)


def test_dense_and_transposed_layers() -> None:
    def before(net: Builder) -> Any:
        q = net.quantize(net.x)
        weight = net.rng.integers(-128, 128, (3, 5, 4, 4)).astype(np.int8)
        constants = [weight, np.arange(5, dtype=np.int32), np.full(5, 4e-4, np.float32)]
        a = net.emit(
            "up", "lpsn.conv2d_transpose", [q, *map(graph.constant, constants)],
            strides=(2, 2), padding=(1, 1, 1, 1), x_zero_point=110, out_zero_point=110,
        )  # fmt: skip
        a = looked_up(net, "up.act", a)
        flat = net.emit("flat", "lpsn.reshape", [a], shape=(1, 5 * 20 * 24))
        return looked_up(net, "fc.act", dense(net, "fc", flat, 7), SIGNED)

    mod = Builder().build(before)
    after = fuse_tables(mod)
    assert operators(after) == ["lpsn.quantize", "lpsn.conv2d_transpose", "lpsn.reshape", "lpsn.dense"]
    assert_same_results(mod, after)


def _read_twice(net: Builder) -> Any:
    a = net.conv("conv", net.quantize(net.x), 8)
    return net.conv("next", looked_up(net, "act", a), 8, residual=a)


def _read_by_two_tables(net: Builder) -> Any:
    a = net.conv("conv", net.quantize(net.x), 8)
    return relax.Tuple([looked_up(net, "act", a), looked_up(net, "other", a, SIGNED)])


def _is_output(net: Builder) -> Any:
    a = net.conv("conv", net.quantize(net.x), 8)
    return relax.Tuple([a, looked_up(net, "act", a)])


def _per_channel(net: Builder) -> Any:
    table = TABLES.integers(0, 256, (8, 256)).astype(np.uint8)
    return looked_up(net, "act", net.conv("conv", net.quantize(net.x), 8), table, "lpsn.channel_lookup")


def _wide(net: Builder) -> Any:
    return looked_up(net, "act", net.conv("conv", net.quantize(net.x), 8), BYTES.astype(np.float32))


def _no_layer(net: Builder) -> Any:
    return looked_up(net, "act", net.quantize(net.x))


def _table_is_too_short(net: Builder) -> Any:
    return looked_up(net, "act", net.conv("conv", net.quantize(net.x), 8, qmin=30), BYTES[:200], qmin=30)


def _residual_of_another_type(net: Builder) -> Any:
    q = net.quantize(net.x)
    return looked_up(net, "act", net.conv("conv", q, 3, residual=q), SIGNED)


@pytest.mark.parametrize(
    "body",
    [
        _read_twice,
        _read_by_two_tables,
        _is_output,
        _per_channel,
        _wide,
        _no_layer,
        _table_is_too_short,
        _residual_of_another_type,
    ],
)
def test_what_stays_apart(body: Any) -> None:
    mod = Builder().build(body)
    tvm.ir.assert_structural_equal(fuse_tables(mod), mod)


def test_only_the_first_of_two_tables() -> None:
    def before(net: Builder) -> Any:
        a = looked_up(net, "act", net.conv("conv", net.quantize(net.x), 8), SIGNED)
        return looked_up(net, "again", a, BYTES, qmin=-128)

    mod = Builder().build(before)
    after = fuse_tables(mod)
    assert operators(after) == ["lpsn.quantize", "lpsn.conv2d", "lpsn.lookup"]
    assert operators(fuse_tables(after)) == operators(after)
    assert_same_results(mod, after)


def test_half_up() -> None:
    weight = np.random.default_rng(1).integers(-128, 128, (8, 3, 3, 3)).astype(np.int8)
    constants = [weight, np.arange(8, dtype=np.int32), np.full(8, 2.0**-7, np.float32)]
    half_up = {"rounding": "half_up", "out_dtype": "int8", "qmin": -128, "qmax": 127}

    def before(net: Builder) -> Any:
        q = net.emit("q", "lpsn.quantize", [net.x], inv_scale=20.0, zero_point=0, qmin=-128, qmax=127, out_dtype="int8")
        same = {"strides": (1, 1), "padding": (1, 1, 1, 1), **half_up}
        a = net.emit("conv", "lpsn.conv2d", [q, *map(graph.constant, constants)], **same)
        return looked_up(net, "act", a, BYTES, qmin=-128)

    mod = Builder().build(before)
    assert operators(fuse_tables(mod)) == ["lpsn.quantize", "lpsn.conv2d"]
    assert_same_results(mod, fuse_tables(mod))


def test_backends_say_whether_they_want_it() -> None:
    wishes = {name: get_backend(name).fuses_epilogues for name in ("llvm", "cuda -arch=sm_86", "vta")}
    assert wishes == {"llvm": False, "cuda -arch=sm_86": True, "vta": False}


def test_lowering_fuses() -> None:
    mod = Builder().build(lambda net: looked_up(net, "act", net.conv("conv", net.quantize(net.x), 8)))
    for target, count in (("llvm", 3), ("cuda -arch=sm_86", 2)):
        lowered = get_backend(target).lower(mod)
        kernels = [name for name in operators(lowered) if name == "relax.call_tir"]
        assert len(kernels) == count + 1, target


@pytest.mark.parametrize("target", ["llvm", "vta"])
def test_other_backends_refuse(target: str) -> None:
    mod = Builder().build(lambda net: net.conv("conv", net.quantize(net.x), 8, table=BYTES.tolist()))
    with pytest.raises(CompileError, match=r"conv: layers of backend .* have no tables"):
        get_backend(target).lower(mod)


def test_results_are_those_of_a_lookup() -> None:
    x = np.random.default_rng(0).integers(0, 256, (2, 6)).astype(np.uint8)
    constants = [np.eye(6, dtype=np.int8), np.zeros(6, np.int32), np.ones(6, np.float32)]
    q = relax.Var("q", relax.TensorType(x.shape, "uint8"))
    call = integer_call(
        "lpsn.dense", [q, *map(graph.constant, constants)], {"qmin": 3, "table": list(range(252, -1, -1))}
    )
    attrs = graph.call_attrs(call)
    np.testing.assert_array_equal(quant.dense(x, *constants, **attrs), 255 - np.maximum(x, 3))
