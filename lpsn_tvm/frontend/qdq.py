"""Take the QuantizeLinear / DequantizeLinear pairs out of a model and keep their scales.

A pair on an activation disappears; where its range starts at zero it also did the work of a ReLU that the exporting
tool removed, so a Clip takes its place unless the value cannot be negative anyway. A dequantized weight becomes a float
weight. What was found travels in the model's metadata.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lpsn_tvm.errors import ModelError, UnsupportedOpError
from lpsn_tvm.quant import QuantParams

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]
KEY = "lpsn_tvm.qdq"
_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_NOT_NEGATIVE = {"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Exp", "Abs", "Sqrt", "Softplus"}
_PASS_ON = set(
    "MaxPool AveragePool GlobalAveragePool GlobalMaxPool Reshape Flatten Transpose Squeeze Unsqueeze Concat Slice "
    "Split Resize DepthToSpace Identity Dropout QuantizeLinear DequantizeLinear".split()
)


@dataclass(frozen=True)
class Found:
    """Quantization parameters by ONNX value name (activations) and by layer (node) name (weights)."""

    activations: dict[str, QuantParams] = field(default_factory=dict)
    weights: dict[str, QuantParams] = field(default_factory=dict)


def strip_to_metadata(model: onnx.ModelProto) -> None:
    """Remove all pairs in place and write what they said into the metadata; nothing happens to a float model."""
    if not any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        return
    found = _Stripper(model).run()
    entry = model.metadata_props.add()
    entry.key = KEY
    entry.value = json.dumps(
        {kind: {name: _to_json(p) for name, p in getattr(found, kind).items()} for kind in ("activations", "weights")}
    )


def from_metadata(model: onnx.ModelProto) -> Found:
    """What `strip_to_metadata` wrote, empty if nothing."""
    for entry in model.metadata_props:
        if entry.key == KEY:
            data = json.loads(entry.value)
            return Found(
                *({name: _from_json(p) for name, p in data[kind].items()} for kind in ("activations", "weights"))
            )
    return Found()


def _to_json(params: QuantParams) -> dict[str, Any]:
    scale = np.asarray(params.scale, np.float32)
    return {
        "scale": scale.tolist(),
        "zero_point": params.zero_point,
        "bits": params.bits,
        "signed": params.signed,
        "axis": params.axis,
    }


def _from_json(data: dict[str, Any]) -> QuantParams:
    return QuantParams(
        np.asarray(data["scale"], np.float32), data["zero_point"], data["bits"], data["signed"], data["axis"]
    )


class _Stripper:
    def __init__(self, model: onnx.ModelProto) -> None:
        from onnx import numpy_helper

        self.model = model
        self.constants: dict[str, Array] = {
            t.name: np.asarray(numpy_helper.to_array(t)) for t in model.graph.initializer
        }
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                self.constants[node.output[0]] = np.asarray(numpy_helper.to_array(node.attribute[0].t))
        self.producer = {name: node for node in model.graph.node for name in node.output}
        self.replaced: dict[str, str] = {}  # value name -> name of the float value that stands for it
        self.quantized: dict[str, str] = {}  # output of a QuantizeLinear -> its float input
        self.found = Found()
        self.weights: dict[str, QuantParams] = {}

    def run(self) -> Found:
        outputs = {value.name for value in self.model.graph.output}
        kept: list[onnx.NodeProto] = []
        for node in self.model.graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = self.replaced.get(name, name)
            if node.op_type == "QuantizeLinear":
                self._quantize(node, kept)
            elif node.op_type == "DequantizeLinear":
                self._dequantize(node)
            else:
                if any(name in self.quantized for name in node.input):
                    raise UnsupportedOpError(
                        "computes on quantized values; export in QDQ format, with a pair around every operator",
                        where=_where(node),
                    )
                if node.op_type in _LAYERS and node.input[1] in self.weights:
                    self._weight_of(node)
                kept.append(node)
        for name in outputs & (set(self.quantized) | set(self.replaced)):
            if name in self.quantized:
                raise UnsupportedOpError(
                    "the output is quantized; end the model with a DequantizeLinear", where=f"output {name!r}"
                )
            kept.append(self._identity(self.replaced[name], name))
        del self.model.graph.node[:]
        self.model.graph.node.extend(kept)
        return self.found

    def _weight_of(self, node: onnx.NodeProto) -> None:
        """Symmetric integer weights; a per-channel scale must lie along the layer's output channels."""
        params = self.weights[node.input[1]]
        transposed = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
        output_axis = 0 if node.op_type == "Conv" or transposed else 1
        if params.zero_point == 0 and (params.axis is None or params.axis == output_axis):
            axis = None if params.axis is None else (0 if node.op_type == "Conv" else 1)
            self.found.weights[node.name] = QuantParams(params.scale, 0, params.bits, params.signed, axis)

    def _quantize(self, node: onnx.NodeProto, kept: list[onnx.NodeProto]) -> None:
        source, out = node.input[0], node.output[0]
        params = self._params(node)
        if source in self.constants:
            self.constants[out] = _quantized(
                self.constants[source], self._scale(node), self._zero_point(node), self._axis(node)
            )
            return
        if params is not None and params.axis is None:
            if params.zero_point == params.qmin and self._may_be_negative(source):
                source = self._clip(node, source, params, kept)
            self.found.activations[source] = params
        self.quantized[out] = source

    def _clip(self, node: onnx.NodeProto, source: str, params: QuantParams, kept: list[onnx.NodeProto]) -> str:
        from onnx import helper, numpy_helper

        name = f"{node.name}.clip"
        bounds = [f"{name}.{which}" for which in ("min", "max")]
        for bound, value in zip(bounds, params.real_range, strict=True):
            self.model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), bound))
        opset = next(entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx"))
        if opset >= 11:
            kept.append(helper.make_node("Clip", [source, *bounds], [name], name=node.name))
        else:
            kept.append(
                helper.make_node(
                    "Clip", [source], [name], name=node.name, min=params.real_range[0], max=params.real_range[1]
                )
            )
        return name

    def _may_be_negative(self, name: str) -> bool:
        """Inputs are taken as they are: their range is the user's."""
        node = self.producer.get(name)
        if node is None or node.op_type in _NOT_NEGATIVE:
            return False
        if node.op_type in _PASS_ON:
            data = node.input if node.op_type == "Concat" else node.input[:1]
            return any(self._may_be_negative(source) for source in data)
        if node.op_type == "Clip":
            low = next((a.f for a in node.attribute if a.name == "min"), None)
            if low is None and len(node.input) > 1 and node.input[1] in self.constants:
                low = float(self.constants[node.input[1]].reshape(()))
            return low is None or low < 0
        return True

    def _dequantize(self, node: onnx.NodeProto) -> None:
        from onnx import numpy_helper

        source, out = node.input[0], node.output[0]
        if source in self.quantized:
            self.replaced[out] = self.quantized[source]
        elif source in self.constants:
            value = _dequantized(self.constants[source], self._scale(node), self._zero_point(node), self._axis(node))
            self.model.graph.initializer.append(numpy_helper.from_array(value, out))
            self.constants[out] = value
            params = self._params(node)
            if params is not None:
                self.weights[out] = params
        else:
            raise UnsupportedOpError(
                "dequantizes a value that no QuantizeLinear made; give the model a float input", where=_where(node)
            )

    def _scale(self, node: onnx.NodeProto) -> Array:
        scale = self.constants.get(node.input[1])
        if scale is None:
            raise UnsupportedOpError(
                "the scale is computed at run time; export with constant scales", where=_where(node)
            )
        if not np.all(np.isfinite(scale)) or np.any(scale <= 0):
            raise ModelError("the scale must be positive and finite", where=_where(node))
        return scale.astype(np.float32)

    def _zero_point(self, node: onnx.NodeProto) -> Array:
        if len(node.input) < 3 or not node.input[2]:
            dtype = (
                self.constants[node.input[0]].dtype
                if node.op_type == "DequantizeLinear" and node.input[0] in self.constants
                else np.uint8
            )
            return np.zeros((), dtype)
        zero_point = self.constants.get(node.input[2])
        if zero_point is None:
            raise UnsupportedOpError(
                "the zero point is computed at run time; export with constant zero points", where=_where(node)
            )
        return zero_point

    def _axis(self, node: onnx.NodeProto) -> int:
        if any(a.name == "block_size" and a.i for a in node.attribute):
            raise UnsupportedOpError("blocked quantization; export per tensor or per channel", where=_where(node))
        return next((a.i for a in node.attribute if a.name == "axis"), 1)

    def _params(self, node: onnx.NodeProto) -> QuantParams | None:
        """None for integer types that are no 2..8 bit quantization (int16, int32 biases, float8)."""
        scale, zero_point = self._scale(node), self._zero_point(node)
        bits, signed = {
            "int8": (8, True),
            "uint8": (8, False),
            "int4": (4, True),
            "uint4": (4, False),
            "int2": (2, True),
            "uint2": (2, False),
        }.get(str(zero_point.dtype), (0, False))
        offsets = np.unique(np.asarray(zero_point).astype(np.int64))
        if not bits or offsets.size != 1:
            return None
        if scale.size == 1:
            return QuantParams(scale.reshape(()), int(offsets[0]), bits, signed, None)
        return QuantParams(scale.reshape(-1), int(offsets[0]), bits, signed, self._axis(node))

    def _identity(self, source: str, name: str) -> onnx.NodeProto:
        from onnx import helper

        return helper.make_node("Identity", [source], [name], name=f"{name}.identity")


def _along(values: Array, axis: int, rank: int) -> Array:
    return (
        values.reshape([-1 if index == axis % rank else 1 for index in range(rank)])
        if values.size > 1
        else values.reshape(())
    )


def _dequantized(values: Array, scale: Array, zero_point: Array, axis: int) -> Array:
    rank = max(values.ndim, 1)
    offset = _along(zero_point.astype(np.float32), axis, rank)
    return ((values.astype(np.float32) - offset) * _along(scale, axis, rank)).astype(np.float32).reshape(values.shape)


def _quantized(values: Array, scale: Array, zero_point: Array, axis: int) -> Array:
    import ml_dtypes

    rank = max(values.ndim, 1)
    describe: Any = ml_dtypes.iinfo
    info = describe(zero_point.dtype)
    rounded: Array = np.rint(values / _along(scale, axis, rank)) + _along(zero_point.astype(np.float32), axis, rank)
    clipped: Array = np.clip(rounded, int(info.min), int(info.max))
    return clipped.astype(zero_point.dtype)


def _where(node: onnx.NodeProto) -> str:
    return f"node {node.name!r} ({node.op_type})"
