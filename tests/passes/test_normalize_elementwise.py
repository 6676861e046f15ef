"""normalize_elementwise: one spelling per function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from lpsn_tvm.passes.normalize_elementwise import normalize_elementwise
from lpsn_tvm.passes.remove_dead import remove_dead
from tests.support.relax_nets import Bind, channel, const, function

op = relax.op
Body = Callable[[Bind, Any], Any]
INF = float("inf")
CASES: dict[str, tuple[Body, Body]] = {
    "constant-second": (
        lambda bind, x: bind("y", op.add(const(2.0), x)),
        lambda bind, x: bind("y", op.add(x, const(2.0))),
    ),
    "subtract": (
        lambda bind, x: bind("y", op.subtract(x, const(2.0))),
        lambda bind, x: bind("y", op.add(x, const(-2.0))),
    ),
    "divide": (
        lambda bind, x: bind("y", op.divide(x, const(4.0))),
        lambda bind, x: bind("y", op.multiply(x, const(0.25))),
    ),
    "reverse-subtract": (
        lambda bind, x: bind("y", op.subtract(const(1.0), x)),
        lambda bind, x: bind("y", op.add(bind("y.neg", op.multiply(x, const(-1.0))), const(1.0))),
    ),
    "reverse-divide": (
        lambda bind, x: bind("y", op.divide(const([1.0]), x)),
        lambda bind, x: bind("y", op.divide(const(1.0), x)),
    ),
    "scalar-shape": (
        lambda bind, x: bind("y", op.add(x, const([[[2.0]]]))),
        lambda bind, x: bind("y", op.add(x, const(2.0))),
    ),
    "channel-shape": (
        lambda bind, x: bind("y", op.multiply(x, const(np.arange(3).reshape(3, 1, 1)))),
        lambda bind, x: bind("y", op.multiply(x, channel(np.arange(3)))),
    ),
    "relu": (lambda bind, x: bind("y", op.maximum(x, const(0.0))), lambda bind, x: bind("y", op.nn.relu(x))),
    "relu6": (lambda bind, x: bind("y", op.nn.relu6(x)), lambda bind, x: bind("y", op.clip(x, 0.0, 6.0))),
    "clip-of-max-min": (
        lambda bind, x: bind("y", op.minimum(bind("m", op.maximum(x, const(-1.0))), const(2.0))),
        lambda bind, x: bind("y", op.clip(x, -1.0, 2.0)),
    ),
    "clip-of-relu": (
        lambda bind, x: bind("y", op.minimum(bind("m", op.nn.relu(x)), const(6.0))),
        lambda bind, x: bind("y", op.clip(x, 0.0, 6.0)),
    ),
    "clip-half-open": (lambda bind, x: bind("y", op.clip(x, 0.0, INF)), lambda bind, x: bind("y", op.nn.relu(x))),
    "silu": (
        lambda bind, x: bind("y", op.multiply(bind("s", op.sigmoid(x)), x)),
        lambda bind, x: bind("y", op.nn.silu(x)),
    ),
    "square": (lambda bind, x: bind("y", op.power(x, const(2.0))), lambda bind, x: bind("y", op.square(x))),
    "row-constant-stays": (
        lambda bind, x: bind("y", op.add(x, const(np.arange(4)))),
        lambda bind, x: bind("y", op.add(x, const(np.arange(4)))),
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_rule(name: str) -> None:
    before, expected = (function(body, x=(1, 3, 4, 4)) for body in CASES[name])
    tvm.ir.assert_structural_equal(remove_dead(normalize_elementwise(before, {}), {}), expected)


def test_a_maximum_that_others_read_is_no_half_of_a_clip() -> None:
    def body(bind: Bind, x: Any) -> Any:
        m = bind("m", op.maximum(x, const(-1.0)))
        return [bind("y", op.minimum(m, const(2.0))), bind("z", op.tanh(m))]

    mod = function(body, x=(1, 3, 4, 4))
    tvm.ir.assert_structural_equal(normalize_elementwise(mod, {}), mod)
