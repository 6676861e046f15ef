"""Every operator against ONNX Runtime: ONNX -> import -> canonical form -> torch, another batch than the traced one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from lpsn_tvm.frontend import import_model, load_model
from lpsn_tvm.interpreter import TorchInterpreter
from lpsn_tvm.passes.canonicalize import canonicalize

RNG = np.random.default_rng(0)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def model_of(
    op: str, shape: tuple[int, ...], operands: tuple[Any, ...], attrs: dict[str, Any], opset: int = 17
) -> onnx.ModelProto:
    """One node between an input (whose batch is a symbol) and an output; None is left out, "x" is the input again."""
    names, constants = ["x"], []
    for index, value in enumerate(operands):
        if value is None or isinstance(value, str):
            names.append(value or "")
        else:
            names.append(f"c{index}")
            constants.append(numpy_helper.from_array(np.asarray(value), f"c{index}"))
    node = helper.make_node(op, names, ["y"], name="node", **attrs)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ("N", *shape[1:]))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "one", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def check(model: onnx.ModelProto, x: np.ndarray, tolerance: float = 2e-5) -> None:
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    interpreter = TorchInterpreter(canonicalize(import_model(load_model(model, batch=1)).mod))
    (actual,) = interpreter.run({"x": x}).values()
    assert tuple(actual.shape) == expected.shape
    np.testing.assert_allclose(actual.numpy(), expected, rtol=tolerance, atol=tolerance)


X = (2, 4, 7, 9)
CONV = {"kernel_shape": [3, 3]}
CASES: dict[str, tuple[str, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = {
    "conv": ("Conv", X, (f32(6, 4, 3, 3), f32(6)), {**CONV, "pads": [1, 1, 1, 1]}),
    "conv without bias": ("Conv", X, (f32(6, 4, 3, 3),), {**CONV, "strides": [2, 1]}),
    "conv lopsided pads": ("Conv", X, (f32(6, 4, 3, 3), f32(6)), {**CONV, "pads": [0, 2, 1, 0], "strides": [2, 2]}),
    "conv dilated": ("Conv", X, (f32(6, 4, 3, 3), f32(6)), {**CONV, "pads": [2, 2, 2, 2], "dilations": [2, 2]}),
    "conv grouped": ("Conv", X, (f32(6, 2, 3, 3), f32(6)), {**CONV, "group": 2}),
    "conv depthwise": ("Conv", X, (f32(4, 1, 3, 3), f32(4)), {**CONV, "group": 4}),
    "conv depthwise multiplier": ("Conv", X, (f32(8, 1, 3, 3), f32(8)), {**CONV, "group": 4}),
    "conv same_lower": ("Conv", X, (f32(6, 4, 2, 2), f32(6)), {"kernel_shape": [2, 2], "auto_pad": "SAME_LOWER"}),
    "transposed": ("ConvTranspose", X, (f32(4, 5, 3, 3), f32(5)), {**CONV, "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "transposed output_padding": (
        "ConvTranspose", X, (f32(4, 5, 3, 3), f32(5)),
        {**CONV, "strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
    ),
    "transposed lopsided": (
        "ConvTranspose", X, (f32(4, 5, 3, 3), f32(5)), {**CONV, "strides": [2, 2], "pads": [0, 1, 1, 0]}
    ),
    "transposed grouped": ("ConvTranspose", X, (f32(4, 3, 3, 3), f32(6)), {**CONV, "group": 2}),
    "transposed dilated": ("ConvTranspose", X, (f32(4, 3, 3, 3), f32(3)), {**CONV, "dilations": [2, 2]}),
    "gemm": ("Gemm", (2, 8), (f32(8, 5), f32(5)), {}),
    "gemm transposed scaled": ("Gemm", (2, 8), (f32(5, 8), f32(5)), {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    "matmul": ("MatMul", (2, 8), (f32(8, 5),), {}),
    "relu": ("Relu", X, (), {}),
    "clip": ("Clip", X, (np.float32(0), np.float32(1)), {}),
    "clip one end": ("Clip", X, (None, np.float32(0.3)), {}),
    "leaky relu": ("LeakyRelu", X, (), {"alpha": 0.2}),
    "prelu": ("PRelu", X, (f32(4, 1, 1),), {}),
    "prelu one slope": ("PRelu", X, (f32(1),), {}),
    "sigmoid": ("Sigmoid", X, (), {}),
    "tanh": ("Tanh", X, (), {}),
    "hard sigmoid": ("HardSigmoid", X, (), {"alpha": 0.25}),
    "hard swish": ("HardSwish", X, (), {}),
    "elu": ("Elu", X, (), {}),
    "softplus": ("Softplus", X, (), {}),
    "exp": ("Exp", X, (), {}),
    "abs": ("Abs", X, (), {}),
    "neg": ("Neg", X, (), {}),
    "erf": ("Erf", X, (), {}),
    "softmax channels": ("Softmax", X, (), {"axis": 1}),
    "softmax dense": ("Softmax", (2, 8), (), {"axis": -1}),
    "log softmax": ("LogSoftmax", X, (), {"axis": 1}),
    "add constant": ("Add", X, (f32(1, 4, 1, 1),), {}),
    "sub constant": ("Sub", X, (f32(1, 4, 1, 1),), {}),
    "mul constant": ("Mul", X, (f32(4, 1, 1),), {}),
    "div constant": ("Div", X, (np.float32(3),), {}),
    "pow": ("Pow", X, (np.float32(2),), {}),
    "max": ("Max", X, (f32(1, 4, 1, 1),), {}),
    "min": ("Min", X, (f32(1, 4, 1, 1),), {}),
    "add itself": ("Add", X, ("x",), {}),
    "max pool": ("MaxPool", X, (), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "max pool lopsided": ("MaxPool", X, (), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}),
    "max pool ceil": ("MaxPool", X, (), {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    "max pool dilated": ("MaxPool", X, (), {"kernel_shape": [2, 2], "dilations": [2, 2]}),
    "avg pool": ("AveragePool", X, (), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "avg pool counts pad": (
        "AveragePool", X, (), {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1}
    ),
    "avg pool ceil": ("AveragePool", X, (), {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    "avg pool lopsided": ("AveragePool", X, (), {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [0, 1, 1, 0]}),
    "avg pool lopsided counts pad": (
        "AveragePool", X, (), {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [0, 1, 1, 0], "count_include_pad": 1}
    ),
    "global average": ("GlobalAveragePool", X, (), {}),
    "global max": ("GlobalMaxPool", X, (), {}),
    "reduce mean": ("ReduceMean", X, (), {"axes": [2, 3], "keepdims": 0}),
    "reduce sum": ("ReduceSum", X, (i64(1),), {"keepdims": 1}),
    "reduce max": ("ReduceMax", X, (), {"axes": [3], "keepdims": 1}),
    "concat itself": ("Concat", X, ("x",), {"axis": 1}),
    "slice channels": ("Slice", X, (i64(1), i64(3), i64(1)), {}),
    "slice strided": ("Slice", X, (i64(1, 0), i64(9, 8), i64(2, 3), i64(2, 2)), {}),
    "slice backwards": ("Slice", X, (i64(-1), i64(-100), i64(3), i64(-1)), {}),
    "pad constant": ("Pad", X, (i64(0, 0, 1, 2, 0, 0, 0, 1), np.float32(0.5)), {}),
    "pad channels": ("Pad", X, (i64(0, 1, 0, 0, 0, 2, 0, 0),), {}),
    "pad reflect": ("Pad", X, (i64(0, 0, 1, 2, 0, 0, 3, 1),), {"mode": "reflect"}),
    "pad edge": ("Pad", X, (i64(0, 0, 1, 2, 0, 0, 0, 1),), {"mode": "edge"}),
    "reshape flatten": ("Reshape", X, (i64(0, -1),), {}),
    "reshape merge": ("Reshape", X, (i64(0, 4, -1),), {}),
    "flatten": ("Flatten", X, (), {}),
    "transpose": ("Transpose", X, (), {"perm": [0, 2, 3, 1]}),
    "squeeze": ("Squeeze", (2, 4, 1, 1), (i64(2, 3),), {}),
    "unsqueeze": ("Unsqueeze", (2, 4), (i64(2, 3),), {}),
    "depth to space dcr": ("DepthToSpace", (2, 8, 3, 5), (), {"blocksize": 2, "mode": "DCR"}),
    "depth to space crd": ("DepthToSpace", (2, 8, 3, 5), (), {"blocksize": 2, "mode": "CRD"}),
    "space to depth": ("SpaceToDepth", (2, 4, 6, 8), (), {"blocksize": 2}),
    "batch norm": ("BatchNormalization", X, (f32(4), f32(4), f32(4), np.abs(f32(4)) + 0.5), {}),
    "instance norm": ("InstanceNormalization", X, (f32(4), f32(4)), {}),
    "layer norm": ("LayerNormalization", X, (f32(9), f32(9)), {"axis": -1}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operator_matches_onnx_runtime(name: str) -> None:
    op, shape, operands, attrs = CASES[name]
    check(model_of(op, shape, operands, attrs), f32(*shape))


RESIZES = [
    *(("nearest", mode, rounding) for mode in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
      for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")),
    *((method, mode, "") for method in ("linear", "cubic")
      for mode in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")),
]  # fmt: skip


@pytest.mark.parametrize("size", [(14, 18), (5, 4), (7, 12)], ids=["twice", "smaller", "wider"])
@pytest.mark.parametrize(("method", "mode", "rounding"), RESIZES, ids=["-".join(filter(None, r)) for r in RESIZES])
def test_resize_matches_onnx_runtime(method: str, mode: str, rounding: str, size: tuple[int, int]) -> None:
    attrs = {"mode": method, "coordinate_transformation_mode": mode}
    if rounding:
        attrs["nearest_mode"] = rounding
    model = model_of("Resize", X, (None, None, i64(1, 4, *size)), attrs)
    x = f32(1, *X[1:])
    check(model, x, tolerance=2e-4 if method == "cubic" else 5e-5)
