"""Fold shape arithmetic and constants away, keeping every other node and its name.

Real exports compute Reshape targets, Pad widths and Resize sizes from `Shape` nodes. Once the inputs are static all of
that is constant. This folder repeats static shape inference and evaluation of constant nodes by ONNX's own reference
implementation until nothing changes. It needs nothing but the onnx package (the simplifiers on the registry fold
through ONNX Runtime, fuse nodes, and rename or drop nodes while they do).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lpsn_tvm.errors import ModelError

if TYPE_CHECKING:
    import onnx

_NOT_CONSTANT = {
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
    "QuantizeLinear",
}
_CONTROL_FLOW = {"If", "Loop", "Scan"}


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model in which everything that the static shapes determine is an initializer; dead nodes and initializers
    removed.

    Raises
    ------
    ModelError
        Shape inference finds a contradiction (for example an input shape that the network cannot take).
    """
    while True:
        model = _infer(model)
        if not _fold_once(model):
            break
    _remove_dead(model)
    return model


def _infer(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx

    del model.graph.value_info[:]
    try:
        return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError:
        # Custom operators and a few gaps of the strict mode must not hide the real cause, which the importer names with
        # its node.
        try:
            return onnx.shape_inference.infer_shapes(model, strict_mode=False, data_prop=True)
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
            raise ModelError(f"shape inference failed: {error}", where="model") from error


def static_shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Value name -> shape, for all values whose shape is known and static."""
    shapes: dict[str, tuple[int, ...]] = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            shapes[value.name] = tuple(dim.dim_value for dim in tensor.shape.dim)
    return shapes


def _fold_once(model: onnx.ModelProto) -> bool:
    """Replace every node that is constant now by initializers, in place; whether there was one."""
    from onnx import numpy_helper

    shapes = static_shapes(model)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    values: dict[str, npt.NDArray[Any]] = {}

    def constant(name: str) -> npt.NDArray[Any]:
        if name not in values:
            values[name] = np.asarray(numpy_helper.to_array(tensors[name]))
        return values[name]

    outputs = {value.name for value in model.graph.output}
    kept, folded = [], False
    for node in model.graph.node:
        results = None
        if not outputs.intersection(node.output):
            known = {name for name in node.input if name in tensors or name in values}
            results = _evaluate(model, node, shapes, known, constant)
        if results is None:
            kept.append(node)
            continue
        folded = True
        for name, result in zip(node.output, results, strict=False):
            if name:
                values[name] = np.asarray(result)
                model.graph.initializer.append(
                    numpy_helper.from_array(np.ascontiguousarray(result).reshape(np.shape(result)), name)
                )
    if folded:
        del model.graph.node[:]
        model.graph.node.extend(kept)
    return folded


def _evaluate(
    model: onnx.ModelProto, node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]], known: set[str], constant: Any
) -> Any:
    """The values of a node's outputs if they are constant, else None."""
    if node.domain not in ("", "ai.onnx") or node.op_type in _NOT_CONSTANT or node.op_type in _CONTROL_FLOW:
        return None
    if node.op_type == "Shape" and node.input[0] in shapes:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        shape = np.asarray(shapes[node.input[0]], np.int64)
        return [shape[attributes.get("start", 0) : attributes.get("end", len(shape))]]
    if node.op_type == "Size" and node.input[0] in shapes:
        return [np.asarray(np.prod(shapes[node.input[0]], dtype=np.int64))]
    if any(name and name not in known for name in node.input):
        return None
    return _reference(model, node, {name: constant(name) for name in node.input if name})


def _reference(model: onnx.ModelProto, node: onnx.NodeProto, feeds: dict[str, npt.NDArray[Any]]) -> Any:
    """Evaluate one node by ONNX's reference implementation; None where that fails (the importer then meets the node and
    names it).
    """
    from onnx import TypeProto, helper
    from onnx.reference import ReferenceEvaluator

    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    outputs = [helper.make_value_info(name, TypeProto()) for name in node.output if name]
    graph = helper.make_graph([node], "constant", inputs, outputs)
    single = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    try:
        return ReferenceEvaluator(single).run(None, feeds)
    except Exception:  # any failure of a third-party evaluator means only "not folded"
        return None


def _remove_dead(model: onnx.ModelProto) -> None:
    """Drop nodes and initializers that no output needs, in place."""
    needed = {value.name for value in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    needed.update(name for inner in attribute.g.node for name in inner.input)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    weights = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights)
