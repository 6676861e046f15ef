from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from small_graphs import Net, random_feed, simple_plan
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.errors import LpsnError, QuantizeError, UnsupportedOpError
from lpsn_tvm.export import to_onnx
from lpsn_tvm.passes.lower_to_integer import lower_to_integer
from lpsn_tvm.quant import QuantPlan
from lpsn_tvm.reference import run_reference

op = relax.op


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def constant(*values: float, shape: tuple[int, ...] | None = None) -> Any:
    array = np.array(values, np.float32)
    return graph.constant(array.reshape(shape) if shape is not None else array)


def resize(x: Any, size: tuple[int, int], method: str, transform: str, rounding: str = "floor") -> Any:
    return op.image.resize2d(
        x,
        size,
        layout="NCHW",
        method=method,
        coordinate_transformation_mode=transform,
        rounding_method=rounding,
        cubic_alpha=-0.75,
    )


# On x = float32[2, 4, 6, 6].
CASES = {
    "relu": lambda x: op.nn.relu(x),
    "clip": lambda x: op.clip(x, -0.5, 0.5),
    "leakyrelu": lambda x: op.nn.leakyrelu(x, 0.3),
    "prelu": lambda x: op.nn.prelu(x, constant(0.1, 0.2, 0.3, 0.4), 1),
    "silu": lambda x: op.nn.silu(x),
    "gelu": lambda x: op.nn.gelu(x),
    "gelu_tanh": lambda x: op.nn.gelu_tanh(x),
    "softplus": lambda x: op.nn.softplus(x, 2.0),
    "selu": lambda x: op.nn.selu(x),
    "square": lambda x: op.square(x),
    "round": lambda x: op.round(x),
    "sign": lambda x: op.sign(x),
    "add_constant": lambda x: op.add(x, constant(1.0, 2.0, 3.0, 4.0, shape=(1, 4, 1, 1))),
    "divide_constant": lambda x: op.divide(constant(1.0, shape=()), op.add(op.square(x), constant(1.0, shape=()))),
    "maximum": lambda x: op.maximum(x, constant(0.25, shape=())),
    "power": lambda x: op.power(op.abs(x), constant(1.5, shape=())),
    "rsqrt": lambda x: op.rsqrt(op.add(op.abs(x), constant(0.1, shape=()))),
    "max_pool": lambda x: op.nn.max_pool2d(x, (3, 2), (2, 1), (1, 0, 1, 1)),
    "avg_pool": lambda x: op.nn.avg_pool2d(x, (3, 2), (2, 1), (1, 0, 1, 1)),
    "avg_pool_pad": lambda x: op.nn.avg_pool2d(x, (3, 3), (2, 2), (1, 1, 1, 1), count_include_pad=True),
    "mean": lambda x: op.mean(x, [2, 3], True),
    "mean_flat": lambda x: op.mean(x, [1, 3], False),
    "sum": lambda x: op.sum(x, [1], True),
    "max": lambda x: op.max(x, [2, 3], True),
    "min": lambda x: op.min(x, [2], False),
    "variance": lambda x: op.variance(x, [2, 3], True),
    "concat": lambda x: op.concat([x, x], 1),
    "reshape": lambda x: op.reshape(x, (2, 144)),
    "permute": lambda x: op.permute_dims(x, (0, 2, 3, 1)),
    "broadcast": lambda x: op.broadcast_to(op.mean(x, [2, 3], True), (2, 4, 3, 3)),
    "slice": lambda x: op.strided_slice(x, [1, 3], [1, 5], [4, -7], [2, -2]),
    "pad": lambda x: op.nn.pad(x, [0, 0, 0, 1, 1, 2, 0, 3], pad_value=2.0),
    "pad_reflect": lambda x: op.nn.pad(x, [0, 0, 0, 0, 1, 2, 0, 3], pad_mode="reflect"),
    "pad_replicate": lambda x: op.nn.pad(x, [0, 0, 0, 0, 1, 2, 0, 3], pad_mode="replicate"),
    "take": lambda x: op.take(x, graph.constant(np.array([2, 0, 3], np.int64)), 1),
    "pixel_shuffle": lambda x: op.nn.pixel_shuffle(x, 2),
    "nearest": lambda x: resize(x, (12, 18), "nearest_neighbor", "asymmetric"),
    "nearest_tf": lambda x: resize(x, (3, 12), "nearest_neighbor", "tf_half_pixel_for_nn"),
    "linear": lambda x: resize(x, (12, 3), "linear", "half_pixel"),
    "linear_corners": lambda x: resize(x, (9, 11), "linear", "align_corners"),
    "cubic": lambda x: resize(x, (12, 12), "cubic", "half_pixel"),
    "softmax": lambda x: op.nn.softmax(x, 1),
    "log_softmax": lambda x: op.nn.log_softmax(x, 1),
    "instance_norm": lambda x: op.nn.instance_norm(
        x, constant(1, 2, 3, 4), constant(4, 3, 2, 1), channel_axis=1, axes=[2, 3]
    ),
    "group_norm": lambda x: op.nn.group_norm(x, constant(1, 2, 3, 4), constant(4, 3, 2, 1), 2, 1, [2, 3]),
    "layer_norm": lambda x: op.nn.layer_norm(x, constant(1, 2, 3, 4, 5, 6), constant(6, 5, 4, 3, 2, 1), [3]),
}


def unary(build: Any, shape: tuple[int, ...] = (2, 4, 6, 6)) -> Any:
    """A canonical module of the nested calls of `build`, one operator per binding."""
    net = Net(shape)

    def emit(call: Any) -> Any:
        args = [emit(arg) if isinstance(arg, relax.Call) else arg for arg in call.args]
        if len(args) == 1 and isinstance(args[0], relax.Tuple):
            args = [relax.Tuple([emit(f) if isinstance(f, relax.Call) else f for f in args[0].fields])]
        return net.emit(relax.Call(call.op, args, call.attrs, list(call.ty_args)))

    return net.module(emit(build(net.input)))


@pytest.mark.parametrize("opset", [17, 18, 21])
@pytest.mark.parametrize("case", CASES)
def test_float_operator_agrees_with_onnx_runtime(case: str, opset: int) -> None:
    mod = unary(CASES[case])
    feeds = random_feed(mod)
    (want,) = run_reference(mod, feeds).values()
    (got,) = run(to_onnx(mod, opset=opset), feeds)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-4)


def small_network(batch: int = 1) -> Any:
    net = Net((batch, 3, 8, 8))
    x = net.emit(op.nn.relu(net.conv(net.input, 8, name="conv/first.0", strides=[2, 1])), "relu/first.0")
    y = net.emit(op.add(net.conv(x, 8, groups=8, name="depthwise"), x), "sum")
    y = net.emit(op.clip(y, 0, 6), "clipped")
    z = net.emit(op.concat([y, net.conv_transpose(y, 4, 3, padding=[1, 1, 1, 1], groups=2)], 1))
    z = net.emit(op.nn.silu(net.conv(z, 8, name="mixed")))
    z = net.emit(op.nn.max_pool2d(z, (2, 2), (2, 2)))
    head = net.conv(z, 4, 1, name="map")
    flat = net.emit(op.reshape(net.emit(op.mean(z, [2, 3], True)), (batch, 8)))
    return net.module(net.dense(flat, 5, name="logits"), head)


def test_float_network_keeps_names() -> None:
    mod = small_network()
    model = to_onnx(mod, output_names=["scores", "heat.map"])
    assert [o.name for o in model.graph.output] == ["scores", "heat.map"] and [i.name for i in model.graph.input] == [
        "input"
    ]
    assert {"conv/first.0", "depthwise", "mixed", "map", "logits"} <= {node.name for node in model.graph.node}
    for got, want in zip(run(model, random_feed(mod)), run_reference(mod, random_feed(mod)).values(), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "qdq"])
def test_dynamic_batch_is_a_symbol(quantized: bool) -> None:
    mod = small_network()
    model = to_onnx(mod, plan=simple_plan(mod) if quantized else None, dynamic_batch=True)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    feeds = random_feed(small_network(3))
    together = run(model, feeds)
    for index in range(3):
        alone = run(model, {"input": feeds["input"][index : index + 1]})
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[index : index + 1], b, atol=1e-5)


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("signed", [False, True], ids=["uint8", "int8"])
@pytest.mark.parametrize("bits", [8, 5, 2])
def test_qdq_network_computes_on_the_integer_networks_grid(bits: int, signed: bool, opset: int) -> None:
    mod = small_network()
    plan = simple_plan(mod, bits, bits, signed)
    feeds = random_feed(mod)
    want = run_reference(lower_to_integer(mod, plan), feeds)
    model = to_onnx(mod, plan=plan, opset=opset)
    for got, expected in zip(run(model, feeds), want.values(), strict=True):
        spread = float(np.ptp(expected))
        # A value on a rounding boundary may fall to either side, one step of the last tensor or so.
        assert np.mean(np.abs(got - expected)) < 0.02 * spread, (got, expected)
    weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert (
        weights["conv/first.0.weight.q"] == onnx.TensorProto.INT8 and weights["logits.bias.q"] == onnx.TensorProto.INT32
    )
    assert any(node.output[0].endswith(".clip") for node in model.graph.node) == (bits < 8)


def test_model_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    mod = small_network()
    path = tmp_path / "net.onnx"
    to_onnx(mod, path)
    onnx.checker.check_model(onnx.load(path))
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    with pytest.raises(LpsnError, match="missing"):
        to_onnx(mod, tmp_path / "missing" / "net.onnx")
    with pytest.raises(LpsnError, match="folder"):
        to_onnx(mod, tmp_path)


def test_bad_requests_are_errors() -> None:
    mod = small_network()
    with pytest.raises(LpsnError, match=r"opset 9 is not supported; allowed are 17 to 21"):
        to_onnx(mod, opset=9)
    with pytest.raises(LpsnError, match="2 outputs need as many names"):
        to_onnx(mod, output_names=["one"])
    with pytest.raises(QuantizeError, match="no activation parameters"):
        to_onnx(mod, plan=QuantPlan({}, {}))
    with pytest.raises(UnsupportedOpError, match=r"relax\.triu has no ONNX form"):
        to_onnx(unary(lambda x: op.triu(x)))
    with pytest.raises(UnsupportedOpError, match="mixes the batch"):
        to_onnx(unary(lambda x: op.reshape(x, (8, 36))), dynamic_batch=True)


def test_an_input_that_is_returned_gets_a_name_of_its_own() -> None:
    net = Net((1, 4))
    mod = net.module(net.dense(net.input, 3, "fc"), net.input)
    model = to_onnx(mod, output_names=["fc", "same"])
    feeds = random_feed(mod)
    np.testing.assert_array_equal(run(model, feeds)[1], feeds["input"])


@pytest.mark.slow
def test_exported_build_computes_what_the_compiled_module_computes(tmp_path: Path) -> None:
    """ONNX -> build (pruned, 4 bits) -> ONNX: ONNX Runtime and the compiled module agree, names and dots included."""
    import lpsn_tvm
    from benchmarks import models as zoo

    images = zoo.smooth_noise((32, 3, 32, 32), 1)
    module = lpsn_tvm.build(zoo.resnet20(), bits=4, sparsity=0.5, calibration=images, measure=False, progress=False)
    model = module.to_onnx(tmp_path / "small.onnx")
    assert [o.name for o in model.graph.output] == [o.name for o in zoo.resnet20().graph.output]
    for image in images[:4]:
        (got,) = run(model, {model.graph.input[0].name: image[None]})
        want = np.asarray(module(image[None]))
        assert np.mean(np.abs(got - want)) < 0.02 * np.ptp(want)
