"""sink_transposes: inverse transposes of channels-last exports vanish."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.passes.sink_transposes import sink_transposes
from tests.support.onnx_nets import run_module
from tests.support.relax_nets import Bind, const, function, random

op = relax.op
TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def test_elementwise_between_inverse_transposes() -> None:
    bias = np.arange(3)

    def before(bind: Bind, x: Any) -> Any:
        t = bind("t", op.permute_dims(x, TO_LAST))
        r = bind("r", op.nn.relu(bind("b", op.add(t, const(bias)))))
        return bind("y", op.tanh(bind("u", op.permute_dims(r, TO_FIRST))))

    def expected(bind: Bind, x: Any) -> Any:
        return bind("y", op.tanh(bind("r", op.nn.relu(bind("b", op.add(x, const(bias.reshape(1, 3, 1, 1))))))))

    renamed: dict[str, str] = {}
    result = sink_transposes(function(before, x=(1, 3, 4, 5)), renamed)
    tvm.ir.assert_structural_equal(result, function(expected, x=(1, 3, 4, 5)))
    assert renamed == {"u": "r"}


def test_residual_concat_pad_and_reduction() -> None:
    def before(bind: Bind, x: Any) -> Any:
        t = bind("t", op.permute_dims(x, TO_LAST))
        s = bind("s", op.add(t, bind("h", op.tanh(t))))
        c = bind("c", op.concat([s, t], 3))
        p = bind("p", op.nn.pad(c, (0, 0, 1, 2, 0, 1, 0, 0)))
        return bind("m", op.mean(p, [1, 2], False))

    def expected(bind: Bind, x: Any) -> Any:
        s = bind("s", op.add(x, bind("h", op.tanh(x))))
        p = bind("p", op.nn.pad(bind("c", op.concat([s, x], 1)), (0, 0, 0, 0, 1, 2, 0, 1)))
        return bind("m", op.mean(p, [2, 3], False))

    tvm.ir.assert_structural_equal(
        sink_transposes(function(before, x=(1, 3, 4, 5)), {}), function(expected, x=(1, 3, 4, 5))
    )


def test_an_operator_that_needs_its_layout_gets_it() -> None:
    """A reshape, a softmax over another axis, a slice, an output in channels-last: same numbers as before."""

    def body(bind: Bind, x: Any) -> Any:
        t = bind("t", op.permute_dims(x, TO_LAST))
        r = bind("r", op.nn.relu(t))
        flat = bind("flat", op.reshape(r, (1, 60)))
        cut = bind("cut", op.strided_slice(r, [1, 3], [1, 0], [3, 2], [1, 1]))
        soft = bind("soft", op.nn.softmax(r, axis=3))
        other = bind("other", op.add(r, bind("w", op.permute_dims(x, [0, 2, 3, 1]))))
        return [flat, cut, soft, r, other, bind("k", op.max(r, [3], True))]

    mod = function(body, x=(1, 3, 4, 5))
    sunk = sink_transposes(mod, {})
    names = [var.name for var, value in graph.bindings(sunk) if graph.op_name(value)]
    assert len(names) == len(set(names))
    x = random(1, 3, 4, 5)
    for got, expected in zip(run_module(sunk, [x]), run_module(mod, [x]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)
