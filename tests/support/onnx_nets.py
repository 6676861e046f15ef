"""Tiny ONNX models for tests, and their evaluation by ONNX Runtime and by a plain TVM build of the canonical module."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lpsn_tvm.frontend import import_model, load_model
from lpsn_tvm.passes.canonicalize import canonicalize
from lpsn_tvm.passes.expand_pixel_shuffle import expand_pixel_shuffle


class OnnxNet:
    """Collects nodes and weights. Values are named by their node: `net.add("Relu", "x", name="r") == "r"`."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[str] = []

    def input(self, name: str, *shape: Any, kind: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def const(self, value: Any, dtype: str = "float32") -> str:
        name = f"const{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weight(self, *shape: int) -> str:
        return self.const(self.rng.standard_normal(shape) / np.sqrt(max(np.prod(shape[1:]), 1)))

    def add(self, op: str, *inputs: str, name: str | None = None, outputs: int = 1, **attrs: Any) -> Any:
        name = name or f"{op.lower()}{len(self.nodes)}"
        results = [name] if outputs == 1 else [f"{name}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), results, name=name, **attrs))
        return results[0] if outputs == 1 else results

    def model(self, *outputs: str, opset: int = 17, ir_version: int = 9) -> onnx.ModelProto:
        infos = [
            helper.make_value_info(name, helper.make_tensor_type_proto(TensorProto.FLOAT, None)) for name in outputs
        ]
        graph = helper.make_graph(self.nodes, "net", self.inputs, infos, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def random_feeds(model: onnx.ModelProto, seed: int = 1) -> dict[str, Any]:
    """Standard normal inputs; dynamic dimensions are 1."""
    rng = np.random.default_rng(seed)
    return {
        value.name: rng.standard_normal([dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim]).astype(
            np.float32
        )
        for value in model.graph.input
    }


def run_onnx(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    """By ONNX Runtime, one thread, no fusions."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def run_module(mod: Any, inputs: list[Any]) -> list[Any]:
    """By `relax.build` without any schedule of ours."""
    import tvm
    from tvm import relax

    vm = relax.VirtualMachine(relax.build(expand_pixel_shuffle(mod), "llvm"), tvm.cpu())
    result = vm["main"](*(tvm.runtime.tensor(value) for value in inputs))
    return [result.numpy()] if hasattr(result, "numpy") else [item.numpy() for item in result]


def canonical(model: onnx.ModelProto, **options: Any) -> Any:
    """load_model, import_model, canonicalize."""
    return canonicalize(import_model(load_model(model, **options)).mod, debug=True)


def max_error(model: onnx.ModelProto, seed: int = 1, **options: Any) -> float:
    """Largest difference between ONNX Runtime on the model and the canonical module, relative to the largest output."""
    feeds = random_feeds(load_model(model, **options), seed)
    expected = run_onnx(model, feeds)
    got = run_module(canonical(model, **options), list(feeds.values()))
    assert [value.shape for value in got] == [value.shape for value in expected]
    return max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-3)) for a, b in zip(expected, got, strict=True))
