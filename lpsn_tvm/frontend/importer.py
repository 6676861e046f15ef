"""ONNX graph -> raw Relax: one converter per operator, every result bound under the exact name of its node.

TVM's own importer is not used: it renames values, leaves compiled functions (`call_tir`) for Clip, Pad and Tile that no
pass can look into, and knows neither `ceil_mode` nor scale semantics of ONNX exactly. The converters here emit the
conventions of `canonicalize` directly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm import relax

from lpsn_tvm import graph
from lpsn_tvm.errors import LpsnError, ModelError, UnsupportedOpError
from lpsn_tvm.frontend import convert_elementwise, convert_layers, convert_pooling, convert_resize, convert_shapes, qdq
from lpsn_tvm.frontend.load import opset_of
from lpsn_tvm.frontend.node import Emitter, Node
from lpsn_tvm.quant import QuantParams

if TYPE_CHECKING:
    import onnx

CONVERTERS: dict[str, Callable[[Node], Any]] = {
    **convert_layers.CONVERTERS,
    **convert_pooling.CONVERTERS,
    **convert_elementwise.CONVERTERS,
    **convert_shapes.CONVERTERS,
    **convert_resize.CONVERTERS,
}
INTEGER_OPS = {
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
    "QLinearAdd",
    "QLinearMul",
    "QLinearGlobalAveragePool",
    "DynamicQuantizeLinear",
}


@dataclass(frozen=True)
class ImportedModel:
    """A raw Relax module and what it keeps of the ONNX model.

    Parameters
    ----------
    mod : IRModule
        One function `main`, float32, static, not canonical yet; variables carry the names of their ONNX nodes.
    input_names, output_names : tuple of str
        The model's own names, in order.
    qdq : dict of variable name to QuantParams
        Activations that a QDQ model quantized; names of `mod` (use `canonical_qdq` after canonicalize).
    qdq_weights : dict of layer name to QuantParams
        Weights that a QDQ model quantized symmetrically.
    variables : dict of ONNX value name to variable name
    """

    mod: tvm.IRModule
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    qdq: dict[str, QuantParams] = field(default_factory=dict)
    qdq_weights: dict[str, QuantParams] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def signature(self) -> dict[str, tuple[int, ...]]:
        """Input names and shapes."""
        return {
            name: graph.shape_of(param) for name, param in zip(self.input_names, self.mod["main"].params, strict=True)
        }

    @property
    def input_ranges(self) -> dict[str, tuple[float, float]]:
        """The interval that each input covers, where a QDQ model says so."""
        kept = {name: self.qdq[name] for name in self.input_names if name in self.qdq}
        return {
            name: (
                (params.qmin - params.zero_point) * float(np.asarray(params.scale)),
                (params.qmax - params.zero_point) * float(np.asarray(params.scale)),
            )
            for name, params in kept.items()
            if params.axis is None
        }

    def canonical_qdq(self, mod: tvm.IRModule, renamed: dict[str, str]) -> dict[str, QuantParams]:
        """`qdq` with the names of the canonical module `mod`; `renamed` is what `canonicalize` filled.

        A value that was folded into the layer before it (batch norm) replaces what that layer had: its own old output
        no longer exists.
        """
        present = {param.name for param in mod["main"].params} | {var.name for var, _ in graph.bindings(mod)}
        kept = {name: params for name, params in self.qdq.items() if name in present}
        kept.update({renamed[name]: params for name, params in self.qdq.items() if renamed.get(name) in present})
        return kept

    def canonical_qdq_weights(self, mod: tvm.IRModule) -> dict[str, QuantParams]:
        """The part of `qdq_weights` whose grid still holds the layer's weights in `mod`.

        Folding a batch norm, re-solving or removing channels moves weights off the grid that the QDQ model gave them.
        """
        layers = graph.find_layers(mod)
        return {
            name: params
            for name, params in self.qdq_weights.items()
            if name in layers and _on_grid(layers[name], params)
        }


def _on_grid(layer: graph.Layer, params: QuantParams) -> bool:
    """Whether every weight is a whole multiple of its scale, within the range of the bit width."""
    shape = [1] * layer.weight.ndim
    if params.axis is not None:
        shape[params.axis] = -1
        if layer.weight.shape[params.axis] != params.scale.size:
            return False
    steps = layer.weight / np.asarray(params.scale).reshape(shape)
    whole = np.rint(steps)
    return bool(np.abs(steps - whole).max() < 1e-2 and whole.min() >= params.qmin and whole.max() <= params.qmax)


def import_model(model: onnx.ModelProto) -> ImportedModel:
    """Convert a model of `load_model` to raw Relax.

    Raises
    ------
    UnsupportedOpError
        An operator that cannot be imported, with node, operator and domain.
    ModelError
        A node whose conversion failed, with the cause.
    """
    importer = _Importer(model)
    mod = importer.run()
    found = qdq.from_metadata(model)
    activations = {
        importer.values[name].name: params
        for name, params in found.activations.items()
        if isinstance(importer.values.get(name), relax.Var)
    }
    weights = {layer: params for layer, params in found.weights.items() if layer in importer.node_names}
    variables = {name: expr.name for name, expr in importer.values.items() if isinstance(expr, relax.Var)}
    return ImportedModel(mod, importer.input_names, importer.output_names, activations, weights, variables)


class _Importer:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.opset = opset_of(model)
        self.values: dict[str, Any] = {"": None}
        self.node_names = {node.name for node in model.graph.node}
        self.builder = relax.BlockBuilder()
        self.emitter = Emitter(self.builder, set(self.node_names) | {value.name for value in model.graph.input})
        self.input_names = tuple(value.name for value in model.graph.input)
        self.output_names = tuple(value.name for value in model.graph.output)

    def run(self) -> tvm.IRModule:
        from onnx import numpy_helper

        self._check_operators()
        for tensor in self.model.graph.initializer:
            self.values[tensor.name] = graph.constant(np.asarray(numpy_helper.to_array(tensor)))
        params = []
        for value in self.model.graph.input:
            shape = tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
            params.append(relax.Var(value.name, relax.TensorType(shape, "float32")))
            self.values[value.name] = params[-1]
        with self.builder.function("main", params):
            with self.builder.dataflow():
                for node in self.model.graph.node:
                    self._convert(node)
                outputs = [self._output(name) for name in self.output_names]
                output = self.builder.emit_output(outputs[0] if len(outputs) == 1 else relax.Tuple(outputs))
            self.builder.emit_func_output(output)
        return self.builder.get()

    def _output(self, name: str) -> Any:
        expr = self.values[name]
        if not isinstance(expr, relax.Var):
            raise ModelError("the output does not depend on any input", where=f"output {name!r}")
        return expr

    def _check_operators(self) -> None:
        for node in self.model.graph.node:
            if node.domain not in ("", "ai.onnx"):
                raise UnsupportedOpError(
                    f"operator {node.op_type} of domain {node.domain!r}; only the default ONNX domain is supported",
                    where=_where(node),
                )
            if node.op_type in INTEGER_OPS:
                raise UnsupportedOpError(
                    f"operator {node.op_type} of domain 'ai.onnx' computes in integers; export the model in QDQ format "
                    "(QuantizeLinear / DequantizeLinear pairs), or the float model",
                    where=_where(node),
                )
            if node.op_type not in CONVERTERS and node.op_type != "Constant":
                raise UnsupportedOpError(
                    f"operator {node.op_type} of domain 'ai.onnx' (opset {self.opset}) cannot be imported",
                    where=_where(node),
                )

    def _convert(self, proto: onnx.NodeProto) -> None:
        attrs = _attributes(proto)
        if proto.op_type == "Constant":
            self.values[proto.output[0]] = graph.constant(_constant_node(proto, attrs))
            return
        inputs = [self.values[name] for name in proto.input]
        if not any(isinstance(value, relax.Var) for value in inputs):
            raise ModelError(
                "does not depend on any input of the model", where=_where(proto)
            )  # the simplifier folds all but outputs
        node = Node(proto.name, proto.op_type, inputs, attrs, len(proto.output), self.opset, self.emitter)
        try:
            results = CONVERTERS[proto.op_type](node)
        except LpsnError:
            raise
        except Exception as error:
            # Type inference of TVM and index errors on malformed nodes: the user needs the node, the cause is kept.
            raise ModelError(f"cannot be converted: {_first_line(error)}", where=_where(proto)) from error
        for name, result in zip(proto.output, results if isinstance(results, list) else [results], strict=False):
            _check_extents(result, inputs, proto)
            self.values[name] = result


def _check_extents(result: Any, inputs: list[Any], proto: onnx.NodeProto) -> None:
    """Refuse tensors without elements: an image too small for its pools and unpadded convolutions."""
    if not isinstance(result, relax.Var) or not isinstance(result.ty, relax.TensorType) or result.ty.shape is None:
        return
    if any(isinstance(extent, tvm.tirx.IntImm) and int(extent) < 1 for extent in result.ty.shape.values):
        shapes = ", ".join(str(list(graph.shape_of(value))) for value in inputs if isinstance(value, relax.Var))
        raise ModelError(
            f"its result of shape {list(graph.shape_of(result))} has no elements; its input {shapes} is too small "
            "(input_shapes sets larger ones where the model's size is dynamic)",
            where=_where(proto),
        )


def _attributes(proto: onnx.NodeProto) -> dict[str, Any]:
    from onnx import AttributeProto, helper, numpy_helper

    attrs: dict[str, Any] = {}
    for attribute in proto.attribute:
        value = helper.get_attribute_value(attribute)
        if attribute.type == AttributeProto.STRING:
            value = value.decode()
        elif attribute.type == AttributeProto.TENSOR:
            value = np.asarray(numpy_helper.to_array(value))
        elif attribute.type in (AttributeProto.INTS, AttributeProto.FLOATS):
            value = tuple(value)
        attrs[attribute.name] = value
    return attrs


def _constant_node(proto: onnx.NodeProto, attrs: dict[str, Any]) -> Any:
    for name, dtype in (
        ("value", None),
        ("value_float", "float32"),
        ("value_floats", "float32"),
        ("value_int", "int64"),
        ("value_ints", "int64"),
    ):
        if name in attrs:
            return np.asarray(attrs[name], dtype)
    raise UnsupportedOpError(f"a constant that holds {', '.join(attrs)}", where=_where(proto))


def _where(proto: onnx.NodeProto) -> str:
    return f"node {proto.name!r} ({proto.op_type})"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
