"""add_missing_bias: every layer is an accumulator and a bias."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from lpsn_tvm.passes.add_missing_bias import add_missing_bias
from tests.support.relax_nets import Bind, channel, const, function, random

op = relax.op
CALLS = {
    "conv": lambda x: op.nn.conv2d(x, const(random(4, 3, 1, 1)), padding=(0, 0, 0, 0)),
    "deconv": lambda x: op.nn.conv2d_transpose(x, const(random(3, 2, 2, 2)), padding=(0, 0, 0, 0)),
}


@pytest.mark.parametrize("kind", list(CALLS))
def test_convolutions_get_a_zero_bias(kind: str) -> None:
    def before(bind: Bind, x: Any) -> Any:
        return bind("y", op.nn.relu(bind("c", CALLS[kind](x))))

    def expected(bind: Bind, x: Any) -> Any:
        acc = bind("c.acc", CALLS[kind](x))
        return bind("y", op.nn.relu(bind("c", op.add(acc, channel(np.zeros(int(acc.ty.shape[1])))))))

    tvm.ir.assert_structural_equal(
        add_missing_bias(function(before, x=(1, 3, 4, 4)), {}), function(expected, x=(1, 3, 4, 4))
    )


def test_dense_gets_a_flat_bias() -> None:
    def before(bind: Bind, x: Any) -> Any:
        return bind("d", op.matmul(x, const(random(3, 4))))

    def expected(bind: Bind, x: Any) -> Any:
        return bind("d", op.add(bind("d.acc", op.matmul(x, const(random(3, 4)))), const(np.zeros(4))))

    tvm.ir.assert_structural_equal(add_missing_bias(function(before, x=(2, 3)), {}), function(expected, x=(2, 3)))


def test_a_layer_with_a_bias_is_left_alone() -> None:
    def body(bind: Bind, x: Any) -> Any:
        return bind("c", op.add(bind("c.acc", CALLS["conv"](x)), channel(np.ones(4))))

    mod = function(body, x=(1, 3, 4, 4))
    tvm.ir.assert_structural_equal(add_missing_bias(mod, {}), mod)


def test_a_product_of_two_tensors_is_no_layer() -> None:
    def body(bind: Bind, x: Any) -> Any:
        return bind("p", op.matmul(x, bind("t", op.permute_dims(x, [1, 0]))))

    mod = function(body, x=(3, 3))
    tvm.ir.assert_structural_equal(add_missing_bias(mod, {}), mod)
