"""Float kernels without weights against `float_ops`."""

import numpy as np
import pytest

from lpsn_tvm import float_ops
from lpsn_tvm.schedules.kernel import TensorSpec
from lpsn_tvm.schedules.llvm import normalization
from tests.support.run_kernel import assert_close, assert_exact, rule, run_kernel

blocks = pytest.mark.parametrize("block", [16, 0], ids=["blocked", "plain"])
SHAPE = (2, 20, 6, 9)


def normal(*shape, seed=0, scale=3.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def program(*steps):
    return {"program": float_ops.encode_program([list(step) for step in steps])}


UNARY = sorted(
    set(float_ops.ELEMENTWISE)
    - {"add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "clip", "prelu", "leaky_relu"}
)


@blocks
@pytest.mark.parametrize("name", UNARY)
def test_unary_functions(name, block):
    x = normal(*SHAPE)
    if name in ("log", "sqrt", "rsqrt"):
        x = np.abs(x) + np.float32(1e-3)
    assert_close(
        rule("lpsn.float_elementwise"), "lpsn.float_elementwise", [x], program([name, 0]), block=block, tolerance=2e-6
    )


def test_exponentials_at_the_ends_of_float32():
    x = np.array([-200, -88, -87, -1e-8, 0, 1e-8, 87, 88, 200], np.float32).repeat(16).reshape(1, 16, 3, 3)
    for name in ("sigmoid", "tanh", "silu"):
        assert_close(rule("lpsn.float_elementwise"), "lpsn.float_elementwise", [x], program([name, 0]), tolerance=1e-6)


@blocks
def test_chain_of_several_tensors(block):
    arrays = [normal(*SHAPE), normal(2, 20, 1, 1, seed=1), normal(1, 1, 1, 1, seed=2)]
    chain = program(["sigmoid", 1], ["multiply", 0, 3], ["add", 4, 2], ["leaky_relu", 5, 0.1], ["clip", 6, -2.0, 5.0])
    assert_close(rule("lpsn.float_elementwise"), "lpsn.float_elementwise", arrays, chain, block=block)


def test_constants_among_the_operands():
    x, slope = normal(*SHAPE), normal(1, 20, 1, 1, seed=1)
    attrs = program(["prelu", 1, 0], ["add", 2, 1])
    spec = (TensorSpec(SHAPE, "float32", 16),)
    kernel = rule("lpsn.float_elementwise")(spec, {"tensors0": slope}, attrs, None)
    np.testing.assert_allclose(
        run_kernel(kernel, [x]), float_ops.float_elementwise(slope, x, **attrs), rtol=1e-5, atol=1e-6
    )


@blocks
def test_pooling(block):
    x = normal(*SHAPE)
    window = {"kernel": (3, 3), "strides": (2, 2), "padding": (1, 1, 1, 1)}
    assert_exact(
        rule("lpsn.float_max_pool2d"), "lpsn.float_max_pool2d", [x], {**window, "dilation": (1, 1)}, block=block
    )
    for include in (False, True):
        attrs = {**window, "count_include_pad": include, "ceil_mode": True}
        assert_close(rule("lpsn.float_avg_pool2d"), "lpsn.float_avg_pool2d", [x], attrs, block=block)
    assert_close(rule("lpsn.float_global_avg_pool2d"), "lpsn.float_global_avg_pool2d", [x], {}, block=block)


@blocks
def test_resize_and_pad(block):
    x = normal(*SHAPE)
    attrs = {}
    for axis, size in (("row", SHAPE[2]), ("column", SHAPE[3])):
        attrs[f"{axis}s"] = [min(size - 1, v) for i in range(2 * size) for v in (i // 2, i // 2 + 1)]
        attrs[f"{axis}_weights"] = [v for i in range(2 * size) for v in ((1.0, 0.0) if i % 2 == 0 else (0.3, 0.7))]
    assert_close(rule("lpsn.float_resize_linear"), "lpsn.float_resize_linear", [x], attrs, block=block)
    rows, columns = [5, 0, 3, 3], [8, 8, 0]
    assert_exact(
        rule("lpsn.float_resize_nearest"),
        "lpsn.float_resize_nearest",
        [x],
        {"rows": rows, "columns": columns},
        block=block,
    )
    for mode in ("constant", "reflect", "edge"):
        assert_exact(
            rule("lpsn.float_pad"),
            "lpsn.float_pad",
            [x],
            {"pad_width": (1, 2, 0, 3), "value": -1.5, "mode": mode},
            block=block,
        )


@blocks
@pytest.mark.parametrize("channels", [(16, 32, 5), (20, 12)], ids=str)
def test_concat(block, channels):
    arrays = [normal(1, c, 4, 5, seed=c) for c in channels]
    assert_exact(rule("lpsn.float_concat"), "lpsn.float_concat", arrays, {"axis": 1}, block=block)


@blocks
def test_instance_norm(block):
    constants = {"scale": normal(20, seed=1), "shift": normal(20, seed=2)}
    x = normal(*SHAPE) + np.float32(50)
    assert_exact(
        normalization.float_instance_norm, "lpsn.float_instance_norm", [x], {"epsilon": 1e-5}, constants, block=block
    )


@pytest.mark.parametrize("shape, axis", [((3, 10), 1), ((2, 5, 4, 6), 1), ((2, 5, 4, 6), -1), ((7,), 0)], ids=str)
def test_softmax(shape, axis):
    assert_close(
        normalization.float_softmax,
        "lpsn.float_softmax",
        [normal(*shape, scale=20)],
        {"axis": axis},
        block=0,
        tolerance=1e-6,
    )
