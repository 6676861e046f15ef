"""The small structural passes: dense, pads, pooling, depth-to-space, identities, constants, dead code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from lpsn_tvm.passes.expand_pixel_shuffle import expand_pixel_shuffle
from lpsn_tvm.passes.fold_constants import fold_constants
from lpsn_tvm.passes.fold_zero_pad import fold_zero_pad
from lpsn_tvm.passes.normalize_dense import normalize_dense
from lpsn_tvm.passes.normalize_depth_to_space import normalize_depth_to_space
from lpsn_tvm.passes.normalize_pooling import normalize_pooling
from lpsn_tvm.passes.remove_dead import remove_dead
from lpsn_tvm.passes.remove_identities import remove_identities
from tests.support.onnx_nets import run_module
from tests.support.relax_nets import Bind, channel, const, function, random

op = relax.op
W = random(4, 3, 3, 3)
Body = Callable[..., Any]


def pooled(bind: Bind, x: Any) -> Any:
    return bind("y", op.mean(x, [2, 3], True))


def pooled_flat(bind: Bind, x: Any) -> Any:
    return bind("y", op.reshape(bind("y.pool", op.mean(x, [2, 3], True)), (1, 3)))


CASES: dict[str, tuple[Callable[..., Any], Body, Body]] = {
    "pad-conv": (
        fold_zero_pad,
        lambda bind, x: bind(
            "c", op.nn.conv2d(bind("p", op.nn.pad(x, (0, 0, 0, 0, 1, 2, 3, 0))), const(W), padding=(1, 0, 0, 1))
        ),
        lambda bind, x: bind("c", op.nn.conv2d(x, const(W), padding=(2, 3, 2, 1), out_dtype="float32")),
    ),
    "pad-value-stays": (
        fold_zero_pad,
        lambda bind, x: bind(
            "c", op.nn.conv2d(bind("p", op.nn.pad(x, (0, 0, 0, 0, 1, 1, 1, 1), "constant", 1.0)), const(W))
        ),
        lambda bind, x: bind(
            "c", op.nn.conv2d(bind("p", op.nn.pad(x, (0, 0, 0, 0, 1, 1, 1, 1), "constant", 1.0)), const(W))
        ),
    ),
    "pad-avg-pool": (
        fold_zero_pad,
        lambda bind, x: bind("y", op.nn.avg_pool2d(bind("p", op.nn.pad(x, (0, 0, 0, 0, 1, 1, 1, 1))), (3, 3))),
        lambda bind, x: bind("y", op.nn.avg_pool2d(x, (3, 3), padding=(1, 1, 1, 1), count_include_pad=True)),
    ),
    "pad-max-pool-of-relu": (
        fold_zero_pad,
        lambda bind, x: bind(
            "y", op.nn.max_pool2d(bind("p", op.nn.pad(bind("r", op.nn.relu(x)), (0, 0, 0, 0, 1, 1, 1, 1))), (3, 3))
        ),
        lambda bind, x: bind("y", op.nn.max_pool2d(bind("r", op.nn.relu(x)), (3, 3), padding=(1, 1, 1, 1))),
    ),
    "pad-max-pool-stays": (
        fold_zero_pad,
        lambda bind, x: bind("y", op.nn.max_pool2d(bind("p", op.nn.pad(x, (0, 0, 0, 0, 1, 1, 1, 1))), (3, 3))),
        lambda bind, x: bind("y", op.nn.max_pool2d(bind("p", op.nn.pad(x, (0, 0, 0, 0, 1, 1, 1, 1))), (3, 3))),
    ),
    "mean-without-dims": (normalize_pooling, lambda bind, x: bind("y", op.mean(x, [2, 3], False)), pooled_flat),
    "pool-of-everything": (normalize_pooling, lambda bind, x: bind("y", op.nn.avg_pool2d(x, (4, 5))), pooled),
    "adaptive-pool": (normalize_pooling, lambda bind, x: bind("y", op.nn.adaptive_avg_pool2d(x, (1, 1))), pooled),
    "mean-of-flat": (
        normalize_pooling,
        lambda bind, x: bind("y", op.mean(bind("f", op.reshape(x, (1, 3, 20))), [2], False)),
        pooled_flat,
    ),
    "mean-of-mean": (
        normalize_pooling,
        lambda bind, x: bind("y", op.mean(bind("f", op.mean(x, [3], True)), [2], True)),
        pooled,
    ),
    "mean-of-mean-other-way": (
        normalize_pooling,
        lambda bind, x: bind("y", op.mean(bind("f", op.mean(x, [2], False)), [2], False)),
        pooled_flat,
    ),
    "channel-mean-stays": (
        normalize_pooling,
        lambda bind, x: bind("y", op.mean(x, [1], True)),
        lambda bind, x: bind("y", op.mean(x, [1], True)),
    ),
    "constants": (
        fold_constants,
        lambda bind, x: bind(
            "y", op.multiply(x, bind("w", op.reshape(bind("v", op.add(const([1, 2, 3]), const(1.0))), (1, 3, 1, 1))))
        ),
        lambda bind, x: bind("y", op.multiply(x, channel([2, 3, 4]))),
    ),
    "identities": (
        remove_identities,
        lambda bind, x: bind(
            "y", op.nn.relu(bind("s", op.strided_slice(bind("r", op.reshape(x, (1, 3, 4, 5))), [1], [0], [3], [1])))
        ),
        lambda bind, x: bind("y", op.nn.relu(x)),
    ),
    "reversal-is-no-identity": (
        remove_identities,
        lambda bind, x: bind("y", op.strided_slice(x, [1], [2], [-4], [-1])),
        lambda bind, x: bind("y", op.strided_slice(x, [1], [2], [-4], [-1])),
    ),
    "reshape-of-reshape": (
        remove_identities,
        lambda bind, x: bind("y", op.reshape(bind("a", op.reshape(x, (3, 20))), (60,))),
        lambda bind, x: bind("y", op.reshape(x, (60,))),
    ),
    "dead": (
        remove_dead,
        lambda bind, x: [bind("a", op.tanh(x)), bind("y", op.nn.relu(x))][1],
        lambda bind, x: bind("y", op.nn.relu(x)),
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_rule(name: str) -> None:
    run, *bodies = CASES[name]
    before, expected = (function(body, x=(1, 3, 4, 5)) for body in bodies)
    tvm.ir.assert_structural_equal(remove_dead(run(before, {}), {}), expected)


def test_dense_over_three_dimensions() -> None:
    weight = random(5, 6)

    def before(bind: Bind, x: Any) -> Any:
        return bind("a", op.add(bind("y", op.matmul(x, const(weight))), const(np.arange(6))))

    def expected(bind: Bind, x: Any) -> Any:
        acc = bind("y.acc", op.matmul(bind("y.rows", op.reshape(x, (12, 5))), const(weight)))
        return bind("a", op.reshape(bind("y", op.add(acc, const(np.arange(6)))), (3, 4, 6)))

    tvm.ir.assert_structural_equal(normalize_dense(function(before, x=(3, 4, 5)), {}), function(expected, x=(3, 4, 5)))


def test_dense_behind_a_channels_last_flatten() -> None:
    weight = random(60, 2)

    def before(bind: Bind, x: Any) -> Any:
        flat = bind("f", op.reshape(bind("t", op.permute_dims(x, [0, 2, 3, 1])), (1, 60)))
        return bind("y", op.matmul(flat, const(weight)))

    mod = function(before, x=(1, 3, 4, 5))
    result = remove_dead(normalize_dense(mod, {}), {})
    assert "permute_dims" not in result.script()
    x = random(1, 3, 4, 5)
    np.testing.assert_allclose(run_module(result, [x])[0], run_module(mod, [x])[0], rtol=1e-5)


def shuffled(crd: bool, relu: bool = True) -> Any:
    def body(bind: Bind, x: Any) -> Any:
        c = bind("c", op.add(bind("c.acc", op.nn.conv2d(x, const(random(12, 3, 1, 1)))), channel(np.arange(12))))
        r = bind("r", op.nn.relu(c) if relu else op.nn.softmax(c, axis=1))
        wide = bind("w", op.reshape(r, (1, 3, 2, 2, 4, 5) if crd else (1, 2, 2, 3, 4, 5)))
        moved = bind("m", op.permute_dims(wide, [0, 1, 4, 2, 5, 3] if crd else [0, 3, 4, 1, 5, 2]))
        return bind("y", op.reshape(moved, (1, 3, 8, 10)))

    return function(body, x=(1, 3, 4, 5))


@pytest.mark.parametrize(
    ("crd", "relu", "take"),
    [(True, True, False), (False, True, False), (False, False, True)],
    ids=["crd", "dcr-layer", "dcr-take"],
)
def test_depth_to_space(crd: bool, relu: bool, take: bool) -> None:
    mod = shuffled(crd, relu)
    result = remove_dead(normalize_depth_to_space(mod, {}), {})
    assert "pixel_shuffle" in result.script()
    assert ("take" in result.script()) == take
    x = random(1, 3, 4, 5)
    np.testing.assert_allclose(run_module(result, [x])[0], run_module(mod, [x])[0], rtol=1e-5)


def test_expanded_pixel_shuffle_is_recognized_again() -> None:
    mod = function(lambda bind, x: bind("y", op.nn.pixel_shuffle(x, 2)), x=(1, 12, 4, 5))
    tvm.ir.assert_structural_equal(remove_dead(normalize_depth_to_space(expand_pixel_shuffle(mod), {}), {}), mod)
