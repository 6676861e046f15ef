"""fold_affine: per-channel maps disappear into the layer before them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from lpsn_tvm.passes.fold_affine import fold_affine
from tests.support.relax_nets import Bind, channel, const, function, random

op = relax.op
SCALE = np.array([0.5, 2.0, -1.0, 4.0], np.float32)  # exact in float32, so that golden comparison is bit for bit
SHIFT = np.array([1.0, 0.0, -0.5, 0.25], np.float32)


def test_batch_norm_folds_into_the_convolution() -> None:
    weight, bias = random(4, 3, 3, 3), np.array([1.0, 2.0, 3.0, 4.0], np.float32)

    def before(bind: Bind, x: Any) -> Any:
        acc = bind("c.acc", op.nn.conv2d(x, const(weight), padding=(1, 1, 1, 1)))
        c = bind("c", op.add(acc, channel(bias)))
        m = bind("bn.scale", op.multiply(c, channel(SCALE)))
        return bind("r", op.nn.relu(bind("bn", op.add(m, channel(SHIFT)))))

    def expected(bind: Bind, x: Any) -> Any:
        acc = bind("c.acc", op.nn.conv2d(x, const(weight * SCALE.reshape(4, 1, 1, 1)), padding=(1, 1, 1, 1)))
        return bind("r", op.nn.relu(bind("c", op.add(acc, channel(bias * SCALE + SHIFT)))))

    renamed: dict[str, str] = {}
    result = fold_affine(function(before, x=(1, 3, 8, 8)), renamed)
    tvm.ir.assert_structural_equal(result, function(expected, x=(1, 3, 8, 8)))
    assert renamed == {"bn.scale": "c", "bn": "c"}


def test_grouped_transposed_convolution() -> None:
    """Two groups: output channels 0, 1 stand beside input channels 0..2, output channels 2, 3 beside 3..5."""
    weight = random(6, 2, 2, 2)

    def before(bind: Bind, x: Any) -> Any:
        c = bind("c", op.add(bind("c.acc", op.nn.conv2d_transpose(x, const(weight), groups=2)), channel(np.zeros(4))))
        return bind("m", op.multiply(c, channel(SCALE)))

    def expected(bind: Bind, x: Any) -> Any:
        scaled = weight.copy()
        scaled[:3] *= SCALE[:2].reshape(1, 2, 1, 1)
        scaled[3:] *= SCALE[2:].reshape(1, 2, 1, 1)
        return bind(
            "c", op.add(bind("c.acc", op.nn.conv2d_transpose(x, const(scaled), groups=2)), channel(np.zeros(4)))
        )

    tvm.ir.assert_structural_equal(
        fold_affine(function(before, x=(1, 6, 5, 5)), {}), function(expected, x=(1, 6, 5, 5))
    )


def test_dense() -> None:
    weight = random(3, 4)

    def before(bind: Bind, x: Any) -> Any:
        d = bind("d", op.add(bind("d.acc", op.matmul(x, const(weight))), const(np.ones(4))))
        return bind("a", op.add(bind("m", op.multiply(d, const(SCALE))), const(SHIFT)))

    def expected(bind: Bind, x: Any) -> Any:
        return bind("d", op.add(bind("d.acc", op.matmul(x, const(weight * SCALE))), const(SCALE + SHIFT)))

    tvm.ir.assert_structural_equal(fold_affine(function(before, x=(2, 3)), {}), function(expected, x=(2, 3)))


@pytest.mark.parametrize("reader", ["layer", "accumulator", "scaled"])
def test_what_others_read_stays(reader: str) -> None:
    def body(bind: Bind, x: Any) -> Any:
        acc = bind("c.acc", op.nn.conv2d(x, const(random(4, 3, 1, 1)), padding=(0, 0, 0, 0)))
        c = bind("c", op.add(acc, channel(np.ones(4))))
        m = bind("m", op.multiply(c, channel(SCALE)))
        return [bind("y", op.nn.relu(m)), bind("z", op.tanh({"layer": c, "accumulator": acc, "scaled": m}[reader]))]

    mod = function(body, x=(1, 3, 4, 4))
    result = fold_affine(mod, {})
    if reader == "scaled":
        assert "multiply" not in result.script()
    else:
        tvm.ir.assert_structural_equal(result, mod)


def test_a_full_tensor_constant_is_not_per_channel() -> None:
    def body(bind: Bind, x: Any) -> Any:
        c = bind("c", op.add(bind("c.acc", op.nn.conv2d(x, const(random(4, 3, 1, 1)))), channel(np.ones(4))))
        return bind("y", op.multiply(c, const(random(1, 1, 4, 4))))

    mod = function(body, x=(1, 3, 4, 4))
    tvm.ir.assert_structural_equal(fold_affine(mod, {}), mod)
