"""affine_to_depthwise: maps that no layer precedes become layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.passes.affine_to_depthwise import affine_to_depthwise
from tests.support.relax_nets import Bind, channel, const, function

op = relax.op
SCALE = np.array([0.5, 2.0, -1.0], np.float32)
SHIFT = np.array([1.0, 0.0, -0.5], np.float32)


def test_scale_and_shift_become_one_layer() -> None:
    def before(bind: Bind, x: Any) -> Any:
        return bind(
            "r", op.nn.relu(bind("bn", op.add(bind("bn.scale", op.multiply(x, channel(SCALE))), channel(SHIFT))))
        )

    def expected(bind: Bind, x: Any) -> Any:
        acc = bind(
            "bn.acc",
            op.nn.conv2d(x, const(SCALE.reshape(3, 1, 1, 1)), padding=(0, 0, 0, 0), groups=3, out_dtype="float32"),
        )
        return bind("r", op.nn.relu(bind("bn", op.add(acc, channel(SHIFT)))))

    result = affine_to_depthwise(function(before, x=(1, 3, 4, 4)), {})
    tvm.ir.assert_structural_equal(result, function(expected, x=(1, 3, 4, 4)))
    assert graph.find_layers(result)["bn"].is_depthwise


def test_two_dimensions_are_reshaped() -> None:
    def before(bind: Bind, x: Any) -> Any:
        return bind("m", op.multiply(x, const(SCALE)))

    def expected(bind: Bind, x: Any) -> Any:
        image = bind("m.image", op.reshape(x, (2, 3, 1, 1)))
        acc = bind(
            "m.acc",
            op.nn.conv2d(image, const(SCALE.reshape(3, 1, 1, 1)), padding=(0, 0, 0, 0), groups=3, out_dtype="float32"),
        )
        return bind("m.shape", op.reshape(bind("m", op.add(acc, channel(np.zeros(3)))), (2, 3)))

    tvm.ir.assert_structural_equal(affine_to_depthwise(function(before, x=(2, 3)), {}), function(expected, x=(2, 3)))


def test_scalars_stay_elementwise() -> None:
    def body(bind: Bind, x: Any) -> Any:
        return bind("y", op.clip(bind("a", op.add(bind("m", op.multiply(x, const(0.2))), const(0.5))), 0.0, 1.0))

    mod = function(body, x=(1, 3, 4, 4))
    tvm.ir.assert_structural_equal(affine_to_depthwise(mod, {}), mod)


def test_a_bias_of_a_layer_is_no_map_of_its_own() -> None:
    def body(bind: Bind, x: Any) -> Any:
        return bind("c", op.add(bind("c.acc", op.nn.conv2d(x, const(np.ones((3, 3, 1, 1))))), channel(SHIFT)))

    mod = function(body, x=(1, 3, 4, 4))
    tvm.ir.assert_structural_equal(affine_to_depthwise(mod, {}), mod)
