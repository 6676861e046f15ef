"""An ONNX network as a torch module, batch norm folded: what torch eager and torch.compile are timed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper

Arrays = dict[str, np.ndarray]


def folded(model: onnx.ModelProto) -> tuple[list[onnx.NodeProto], Arrays]:
    """Nodes without batch norm, and the constants that they read."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    producers = {node.output[0]: node for node in model.graph.node}
    kept: list[onnx.NodeProto] = []
    renamed: dict[str, str] = {}
    for source in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(source)
        node.input[:] = [renamed.get(name, name) for name in node.input]
        if node.op_type == "BatchNormalization":
            _fold(producers[source.input[0]], node, arrays)
            renamed[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    for node in kept:
        if node.op_type == "Conv" and node.name + ".folded" in arrays:
            node.input[:] = [node.input[0], node.name + ".scaled", node.name + ".folded"]
    return kept, arrays


def _fold(conv: onnx.NodeProto, norm: onnx.NodeProto, arrays: Arrays) -> None:
    if conv.op_type != "Conv":
        raise ValueError(f"batch norm after {conv.op_type} cannot be folded")
    scale, shift, mean, variance = (arrays[name].astype(np.float64) for name in norm.input[1:5])
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    factor = scale / np.sqrt(variance + epsilon)
    bias = arrays[conv.input[2]] if len(conv.input) > 2 else 0.0
    arrays[conv.name + ".scaled"] = (arrays[conv.input[1]] * factor[:, None, None, None]).astype(np.float32)
    arrays[conv.name + ".folded"] = ((bias - mean) * factor + shift).astype(np.float32)


class TorchNetwork(torch.nn.Module):
    """Runs a network with one input and one output.

    Parameters
    ----------
    model : onnx.ModelProto
        Of the operators that the benchmark's networks use.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        nodes, arrays = folded(model)
        self.input, self.output = model.graph.input[0].name, model.graph.output[0].name
        self.steps: list[tuple[Callable[..., torch.Tensor], tuple[str, ...], str]] = []
        for node in nodes:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            constants = [arrays[name] for name in node.input if name in arrays]
            values = tuple(name for name in node.input if name and name not in arrays)
            self.steps.append((self._operator(node, attributes, constants), values, node.output[0]))

    def _operator(
        self, node: onnx.NodeProto, attributes: Mapping[str, Any], constants: list[np.ndarray]
    ) -> Callable[..., torch.Tensor]:
        kind = node.op_type
        if kind in ("Conv", "Gemm"):
            layer = _convolution(attributes, constants) if kind == "Conv" else _linear(attributes, constants)
            self.add_module(node.name.replace(".", "_"), layer)
            return layer
        if kind == "Clip":
            low, high = constants[0].item(), constants[1].item()
            return lambda x: torch.clamp(x, low, high)
        if kind == "MaxPool":
            kernel, stride, pad = (attributes[name][0] for name in ("kernel_shape", "strides", "pads"))
            return lambda x: F.max_pool2d(x, kernel, stride, pad)
        if kind == "DepthToSpace":
            block = attributes["blocksize"]
            return lambda x: F.pixel_shuffle(x, block)
        simple: dict[str, Callable[..., torch.Tensor]] = {
            "Relu": torch.relu,
            "Tanh": torch.tanh,
            "Add": torch.add,
            "GlobalAveragePool": lambda x: x.mean((2, 3), keepdim=True),
            "Flatten": lambda x: x.flatten(1),
            "Identity": lambda x: x,
        }
        if kind not in simple:
            raise ValueError(f"{kind} is not an operator of the benchmark's networks")
        return simple[kind]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All steps in order."""
        values = {self.input: x}
        for function, inputs, output in self.steps:
            values[output] = function(*[values[name] for name in inputs])
        return values[self.output]


def _convolution(attributes: Mapping[str, Any], constants: list[np.ndarray]) -> torch.nn.Module:
    weight, groups = constants[0], attributes.get("group", 1)
    layer = torch.nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        tuple(attributes.get("strides", (1, 1))),
        tuple(attributes.get("pads", (0, 0))[:2]),
        tuple(attributes.get("dilations", (1, 1))),
        groups,
        bias=len(constants) > 1,
    )
    return _filled(layer, constants)


def _linear(attributes: Mapping[str, Any], constants: list[np.ndarray]) -> torch.nn.Module:
    if not attributes.get("transB"):
        constants = [constants[0].T, *constants[1:]]
    layer = torch.nn.Linear(constants[0].shape[1], constants[0].shape[0], bias=len(constants) > 1)
    return _filled(layer, constants)


def _filled(layer: torch.nn.Module, constants: list[np.ndarray]) -> torch.nn.Module:
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.array(constants[0], np.float32)))
        if len(constants) > 1:
            layer.bias.copy_(torch.from_numpy(np.array(constants[1], np.float32)))
    return layer
