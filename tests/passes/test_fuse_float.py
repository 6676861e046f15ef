"""Float fusion: golden modules, and results equal to the unfused network."""

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from lpsn_tvm import float_ops, graph
from lpsn_tvm.errors import CompileError
from lpsn_tvm.passes.float_calls import float_call
from lpsn_tvm.passes.fuse_float import fuse_float
from lpsn_tvm.reference import run_reference

INF = float("inf")
op = relax.op


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def const(array):
    return relax.const(np.asarray(array, np.float32))


class Net:
    """A canonical module under construction; `x` is its input."""

    def __init__(self, *shapes):
        self.builder = relax.BlockBuilder()
        self.params = [
            relax.Var(f"x{i}" if i else "x", relax.TensorType(shape, "float32")) for i, shape in enumerate(shapes)
        ]

    def __call__(self, name, call):
        return graph.emit_named(self.builder, call, name)

    def conv(self, name, x, out, kernel=3, seed=0, groups=1):
        weight = normal(out, graph.shape_of(x)[1] // groups, kernel, kernel, seed=seed)
        bias = normal(out, seed=seed + 1)
        acc = self(name + ".acc", op.nn.conv2d(x, const(weight), padding=kernel // 2, groups=groups))
        return self(name, op.add(acc, const(bias.reshape(1, -1, 1, 1)))), weight, bias

    def module(self, body):
        with self.builder.function("main", self.params):
            with self.builder.dataflow():
                result = body(*self.params)
                output = self.builder.emit_output(result)
            self.builder.emit_func_output(output)
        return self.builder.get()


def operators(mod):
    return [graph.op_name(value) for _, value in graph.bindings(mod) if isinstance(value, relax.Call)]


def names(mod):
    return [var.name for var, value in graph.bindings(mod) if isinstance(value, relax.Call)]


def assert_same_results(before, after):
    feeds = {p.name: normal(*graph.shape_of(p), seed=7) for p in before["main"].params}
    wanted, got = run_reference(before, feeds), run_reference(after, feeds)
    for want, have in zip(wanted.values(), got.values(), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-4 * max(1, np.abs(want).max()))


CONV = {"strides": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1}


def test_layer_with_residual_and_relu_becomes_one_call():
    kept = {}

    def before(x):
        a, *kept["a"] = net.conv("a", x, 8)
        a = net("a.relu", op.nn.relu(a))
        b, *kept["b"] = net.conv("b", a, 8, seed=5)
        total = net("sum", op.add(a, b))
        return net("out", op.nn.relu(total))

    net = Net((1, 8, 5, 5))
    given = net.module(before)

    def expected(x):
        shape = (1, 8, 5, 5)
        a = goal(
            "a.relu",
            float_call(
                "lpsn.float_conv2d",
                [x, *map(const, kept["a"])],
                {**CONV, "low": 0.0, "high": INF, "program": ""},
                shape,
            ),
        )
        tensors = [a, *map(const, kept["b"]), a]
        return goal(
            "out", float_call("lpsn.float_conv2d", tensors, {**CONV, "low": 0.0, "high": INF, "program": ""}, shape)
        )

    goal = Net((1, 8, 5, 5))
    want = goal.module(expected)
    got = fuse_float(given)
    tvm.ir.assert_structural_equal(got, want)
    assert names(got) == ["a.relu", "out"]
    assert_same_results(given, got)


def test_of_two_added_layers_the_later_takes_the_sum():
    net = Net((1, 8, 5, 5))
    before = net.module(lambda x: two_layers(net, x))
    after = fuse_float(before)
    assert operators(after) == ["lpsn.float_conv2d", "lpsn.float_conv2d"]
    assert names(after) == ["a", "out"]
    call = dict((var.name, value) for var, value in graph.bindings(after))["out"]
    assert len(call.args) == 5 and call.args[4].name == "a"
    assert graph.call_attrs(call)["low"] == 0.0 and graph.call_attrs(call)["high"] == 6.0
    assert_same_results(before, after)


def two_layers(net, x):
    a, *_ = net.conv("a", x, 8)
    b, *_ = net.conv("b", x, 8, seed=3)
    return net("out", op.clip(net("sum", op.add(a, b)), 0.0, 6.0))


def test_a_layer_that_others_read_too_is_not_swallowed():
    def body(x):
        a, *_ = net.conv("a", x, 8)
        b, *_ = net.conv("b", a, 8, seed=3)
        relu = net("relu", op.nn.relu(a))
        return net("out", op.multiply(relu, b))

    net = Net((1, 8, 5, 5))
    before = net.module(body)
    after = fuse_float(before)
    assert names(after) == ["a", "b", "out"]
    assert operators(after) == ["lpsn.float_conv2d", "lpsn.float_conv2d", "lpsn.float_elementwise"]
    assert_same_results(before, after)


def test_hard_swish_is_the_program_of_its_layer():
    def body(x):
        a, *_ = net.conv("a", x, 8)
        shifted = net("shifted", op.add(a, const(3.0)))
        clipped = net("clipped", op.clip(shifted, 0.0, 6.0))
        scaled = net("scaled", op.multiply(clipped, const(1 / 6)))
        return net("out", op.multiply(a, scaled))

    net = Net((1, 8, 5, 5))
    before = net.module(body)
    after = fuse_float(before)
    assert operators(after) == ["lpsn.float_conv2d"] and names(after) == ["out"]
    text = graph.call_attrs(next(iter(graph.bindings(after)))[1])["program"]
    assert [step[0] for step in float_ops.decode_program(text)] == ["add", "clip", "multiply", "multiply"]
    assert_same_results(before, after)


def test_gate_of_one_pixel_is_not_computed_for_every_pixel():
    def body(x):
        pooled = net("pooled", op.mean(x, [2, 3], keepdims=True))
        gate = net("gate", op.sigmoid(net("scaled", op.multiply(pooled, const(2.0)))))
        return net("out", op.multiply(x, gate))

    net = Net((2, 8, 5, 5))
    before = net.module(body)
    after = fuse_float(before)
    assert operators(after) == ["lpsn.float_global_avg_pool2d", "lpsn.float_elementwise", "lpsn.float_elementwise"]
    assert names(after) == ["pooled", "gate", "out"]
    assert_same_results(before, after)


@pytest.mark.parametrize("swap", [False, True], ids=["layer first", "layer second"])
def test_a_broadcast_addend_is_no_residual(swap):
    def body(x, vector):
        a, *_ = net.conv("a", vector, 8, kernel=1)
        return net("out", op.add(x, a) if swap else op.add(a, x))

    net = Net((1, 8, 5, 5), (1, 8, 1, 1))
    before = net.module(body)
    after = fuse_float(before)
    assert operators(after) == ["lpsn.float_conv2d", "lpsn.float_elementwise"]
    assert_same_results(before, after)


def test_constants_per_channel_and_prelu():
    def body(x):
        a = net("a", op.multiply(x, const(normal(1, 8, 1, 1))))
        b = net("b", op.nn.prelu(a, const(normal(8, seed=1)), 1))
        return net("out", op.nn.leakyrelu(b, 0.2))

    net = Net((2, 8, 5, 5))
    before = net.module(body)
    after = fuse_float(before)
    assert operators(after) == ["lpsn.float_elementwise"]
    assert_same_results(before, after)


SINGLE = {
    "max pool": (lambda x: op.nn.max_pool2d(x, (3, 3), (2, 2), (1, 1)), "float_max_pool2d"),
    "average pool": (lambda x: op.nn.avg_pool2d(x, (3, 3), (2, 2), (1, 1), count_include_pad=True), "float_avg_pool2d"),
    "global average": (lambda x: op.mean(x, [2, 3], keepdims=True), "float_global_avg_pool2d"),
    "flatten": (lambda x: op.reshape(x, (2, 240)), "float_reshape"),
    "transpose": (lambda x: op.permute_dims(x, [0, 2, 3, 1]), "float_transpose"),
    "slice": (lambda x: op.strided_slice(x, [1, 3], [2, 0], [7, 5], [1, 2]), "float_strided_slice"),
    "pad": (lambda x: op.nn.pad(x, (0, 0, 0, 0, 1, 2, 2, 1), "reflect"), "float_pad"),
    "pixel shuffle": (lambda x: op.nn.pixel_shuffle(x, 2), "float_depth_to_space"),
    "resize nearest": (
        lambda x: op.image.resize2d(
            x,
            (10, 12),
            layout="NCHW",
            method="nearest_neighbor",
            coordinate_transformation_mode="asymmetric",
            rounding_method="floor",
        ),
        "float_resize_nearest",
    ),
    "resize linear": (
        lambda x: op.image.resize2d(
            x, (10, 9), layout="NCHW", method="linear", coordinate_transformation_mode="half_pixel"
        ),
        "float_resize_linear",
    ),
    "softmax": (lambda x: op.nn.softmax(x, 1), "float_softmax"),
    "instance norm": (
        lambda x: op.nn.instance_norm(
            x, const(normal(8)), const(normal(8, seed=1)), channel_axis=1, axes=[2, 3], epsilon=1e-3
        ),
        "float_instance_norm",
    ),
}


@pytest.mark.parametrize("make, name", SINGLE.values(), ids=SINGLE)
def test_single_operators(make, name):
    net = Net((2, 8, 5, 6))
    before = net.module(lambda x: net("out", make(x)))
    after = fuse_float(before)
    assert operators(after) == [f"lpsn.{name}"]
    assert_same_results(before, after)


def test_concat_dense_and_transposed_convolution():
    def body(x):
        weight = const(normal(8, 4, 4, 4))
        acc = net("up.acc", op.nn.conv2d_transpose(x, weight, strides=(2, 2), padding=(1, 1)))
        up = net("up", op.add(acc, const(normal(1, 4, 1, 1))))
        up = net("up.relu", op.nn.relu(up))
        both = net("both", op.concat([up, up], 1))
        pooled = net("pooled", op.mean(both, [2, 3], keepdims=True))
        flat = net("flat", op.reshape(pooled, (2, 8)))
        acc = net("fc.acc", op.matmul(flat, const(normal(8, 3))))
        return net("fc", op.add(acc, const(normal(3))))

    net = Net((2, 8, 5, 6))
    before = net.module(body)
    after = fuse_float(before)
    assert operators(after) == [
        f"lpsn.float_{name}" for name in ("conv2d_transpose", "concat", "global_avg_pool2d", "reshape", "dense")
    ]
    assert_same_results(before, after)


def test_what_has_no_kernel_stays_relax():
    net = Net((2, 8, 5, 6))
    before = net.module(lambda x: net("out", op.sin(net("a", op.sum(x, [1], keepdims=True)))))
    tvm.ir.assert_structural_equal(fuse_float(before), before)


def test_integer_operators_are_left_alone():
    from lpsn_tvm.passes.integer_ops import integer_call

    attrs = {"inv_scale": 10.0, "zero_point": 3, "qmin": 0, "qmax": 255, "out_dtype": "uint8"}

    def body(x):
        q = net("q", integer_call("lpsn.quantize", [x], attrs))
        moved = net("moved", integer_call("lpsn.transpose", [q], {"axes": [0, 2, 3, 1]}))
        return net(
            "out", op.nn.relu(net("y", integer_call("lpsn.dequantize", [moved], {"scale": 0.1, "zero_point": 3})))
        )

    net = Net((2, 8, 5, 6))
    before = net.module(body)
    after = fuse_float(before)
    assert operators(after) == ["lpsn.quantize", "lpsn.transpose", "lpsn.dequantize", "lpsn.float_elementwise"]
    assert_same_results(before, after)


def test_several_outputs_keep_their_values():
    def body(x):
        a, *_ = net.conv("a", x, 8)
        b = net("b", op.nn.relu(a))
        return relax.Tuple([a, b])

    net = Net((1, 8, 5, 5))
    before = net.module(body)
    after = fuse_float(before)
    assert names(after) == ["a", "b"]
    assert_same_results(before, after)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_graphs_compute_the_same(data):
    """Random small graphs of layers and elementwise operators with shared values."""
    net = Net((1, 4, 4, 4), (1, 4, 1, 1))

    def body(x, gate):
        values = [x]
        for i in range(data.draw(st.integers(1, 8))):
            pick = st.sampled_from(values)
            kind = data.draw(st.sampled_from(["conv", "add", "multiply", "gate", "relu", "sigmoid", "scale"]))
            a = data.draw(pick)
            if kind == "conv":
                value, *_ = net.conv(f"v{i}", a, 4, seed=i)
            else:
                b = data.draw(pick) if kind in ("add", "multiply") else gate
                binary = {"add": op.add, "multiply": op.multiply, "gate": op.multiply}
                unary = {"relu": op.nn.relu, "sigmoid": op.sigmoid, "scale": lambda t: op.multiply(t, const(0.5))}
                call = binary[kind](a, b) if kind in binary else unary[kind](a)
                value = net(f"v{i}", call)
            values.append(value)
        outputs = data.draw(st.lists(st.sampled_from(values[1:]), min_size=1, max_size=2, unique=True))
        return relax.Tuple(outputs) if len(outputs) > 1 else outputs[0]

    before = net.module(body)
    assert_same_results(before, fuse_float(before))


def test_float_call_checks_its_attributes():
    x = relax.Var("x", relax.TensorType((1, 4), "float32"))
    with pytest.raises(CompileError, match="unknown float operator"):
        float_call("lpsn.float_nothing", [x], {}, (1, 4))
    with pytest.raises(CompileError, match="missing"):
        float_call("lpsn.float_softmax", [x], {}, (1, 4))
