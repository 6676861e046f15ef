"""Small in-place normalizations of a private copy of the model: inputs, node names, element types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lpsn_tvm.errors import ModelError, UnsupportedOpError

if TYPE_CHECKING:
    import onnx


def inputs_without_initializers(model: onnx.ModelProto) -> None:
    """Remove the initializers from the list of graph inputs (models of IR version 3 list them there)."""
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    kept = [value for value in model.graph.input if value.name not in constants]
    if len(kept) != len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(kept)
    if not model.graph.input:
        raise ModelError("the graph has no input besides its weights", where="model")


def inline_functions(model: onnx.ModelProto) -> None:
    """Replace calls of the model's own functions by their bodies: recent exporters write layers as functions."""
    if not model.functions:
        return
    import onnx.inliner

    model.CopyFrom(onnx.inliner.inline_local_functions(model))


def unique_node_names(model: onnx.ModelProto) -> None:
    """Give every node a unique non-empty name that is no input's name either; an unnamed node is called after its first
    output.
    """
    taken = {value.name for value in model.graph.input}
    given = {node.name for node in model.graph.node if node.name}
    for node in model.graph.node:
        wanted = node.name or next((name for name in node.output if name), node.op_type)
        name, count = wanted, 1
        while name in taken or (not node.name and name in given):
            name, count = f"{wanted}_{count}", count + 1
        taken.add(name)
        node.name = name


def to_float32(model: onnx.ModelProto) -> None:
    """Turn float16, bfloat16 and float64 weights, casts, inputs and outputs into float32; integer image inputs lose
    their cast.

    Raises
    ------
    ModelError
        An input has another type and is used otherwise than through a cast to float.
    """
    import onnx
    from onnx import TensorProto, numpy_helper

    wide = {TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
    for holder, tensor in _tensors(model.graph):
        if tensor.data_type in wide:
            value = np.asarray(numpy_helper.to_array(tensor)).astype(np.float32)
            holder.CopyFrom(numpy_helper.from_array(value, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.type == onnx.AttributeProto.INT and attribute.i in wide:
                attribute.i = TensorProto.FLOAT
    for value in (*model.graph.input, *model.graph.output):
        if value.type.WhichOneof("value") != "tensor_type":
            raise ModelError("inputs and outputs must be tensors, not sequences, maps or optionals", where=value.name)
        if value.type.tensor_type.elem_type in wide:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del model.graph.value_info[:]
    for value in model.graph.input:
        if value.type.tensor_type.elem_type != TensorProto.FLOAT:
            _float_input(model, value)


def _float_input(model: onnx.ModelProto, value: onnx.ValueInfoProto) -> None:
    """An integer input that is only read by casts to float becomes a float input: integers up to 2**24 are exact in
    float32.
    """
    from onnx import TensorProto, helper

    users = [node for node in model.graph.node if value.name in node.input]
    casts = all(n.op_type == "Cast" and helper.get_node_attr_value(n, "to") == TensorProto.FLOAT for n in users)
    kind = TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
    if not casts:
        raise ModelError(
            f"input of type {kind}; allowed are float types, or integers that the model first casts to float",
            where=value.name,
        )
    value.type.tensor_type.elem_type = TensorProto.FLOAT


def _tensors(graph: onnx.GraphProto) -> Iterator[tuple[Any, Any]]:
    """Every weight-like tensor with the message that holds it."""
    if graph.sparse_initializer:
        raise UnsupportedOpError(
            "sparse initializers are not supported; export dense weights", where=graph.sparse_initializer[0].values.name
        )
    for tensor in graph.initializer:
        yield tensor, tensor
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t, attribute.t
