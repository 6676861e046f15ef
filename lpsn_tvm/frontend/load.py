"""Read an ONNX model from a path, bytes or a proto; check it, fix its shapes, and leave no shape arithmetic in it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lpsn_tvm.errors import ModelError

if TYPE_CHECKING:
    import onnx

OLDEST_OPSET = 7
PROTOBUF_LIMIT = 2**31 - 1


def load_model(
    source: str | os.PathLike[str] | bytes | onnx.ModelProto,
    *,
    batch: int = 1,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
) -> onnx.ModelProto:
    """Read a model and bring it into the form that `import_model` takes.

    The result is a new model: float32 throughout, initializers not listed as inputs, every input static, every node
    under a unique name, no shape arithmetic, no quantize / dequantize pairs (their scales are kept in its metadata for
    `import_model`).

    Parameters
    ----------
    source : path, bytes or ModelProto
        External data is resolved next to the path. A ModelProto is not changed.
    batch : int
        What a dynamic first dimension of an input becomes; at least 1.
    input_shapes : mapping of input name to shape, optional
        Fixes every other dynamic dimension.

    Raises
    ------
    ModelError
        Missing file, not ONNX, truncated, opset or IR too old or too new, malformed graph, unknown input name, wrong
        rank, dimension left dynamic.
    UnsupportedOpError
        Integer-only quantized operators, or quantization that is not in pairs.
    """
    from lpsn_tvm.frontend import normalize, qdq, shapes, simplify

    where = str(source) if isinstance(source, (str, os.PathLike)) else "model"
    model = _read(source, where)
    _check_versions(model, where)
    _check_structure(model, where)
    normalize.inputs_without_initializers(model)
    normalize.inline_functions(model)
    normalize.unique_node_names(model)
    normalize.to_float32(model)
    shapes.fix_input_shapes(model, batch=batch, input_shapes=input_shapes or {})
    qdq.strip_to_metadata(model)
    return simplify.simplify(model)


def _read(source: str | os.PathLike[str] | bytes | onnx.ModelProto, where: str) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    if isinstance(source, onnx.ModelProto):
        if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in source.graph.initializer):
            raise ModelError(
                "the model's weights are in external files that a ModelProto cannot find; give the path instead",
                where=where,
            )
        copy = onnx.ModelProto()
        copy.CopyFrom(source)
        return copy
    if isinstance(source, (bytes, bytearray, memoryview)):
        data, folder = bytes(source), None
    elif isinstance(source, (str, os.PathLike)):
        data, folder = _read_file(Path(source), where)
    else:
        raise ModelError(f"a model is a path, bytes or an onnx.ModelProto, not {type(source).__name__}", where=where)
    try:
        model = onnx.load_model_from_string(data)
    except DecodeError as error:
        raise ModelError(f"not an ONNX model, or truncated ({len(data)} bytes): {error}", where=where) from error
    _resolve_external_data(model, folder, where)
    return model


def _read_file(path: Path, where: str) -> tuple[bytes, Path]:
    if path.is_dir():
        raise ModelError("is a folder; give the .onnx file", where=where)
    try:
        return path.read_bytes(), path.parent
    except FileNotFoundError as error:
        raise ModelError("there is no such file", where=where) from error
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=where) from error


def _resolve_external_data(model: onnx.ModelProto, folder: Path | None, where: str) -> None:
    import onnx

    external = [t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    if not external:
        return
    if folder is None:
        raise ModelError(
            f"tensor {external[0]!r} is in an external file; bytes have no folder to find it in, give the path instead",
            where=where,
        )
    try:
        onnx.load_external_data_for_model(model, str(folder))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise ModelError(f"external data of tensor {external[0]!r} cannot be read: {error}", where=where) from error


def _check_versions(model: onnx.ModelProto, where: str) -> None:
    import onnx

    if not model.ir_version or not model.graph.ByteSize():
        raise ModelError("not an ONNX model: it has no IR version or no graph", where=where)
    if model.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"IR version {model.ir_version} is newer than this onnx package knows ({onnx.IR_VERSION}); upgrade onnx or "
            "export an older version",
            where=where,
        )
    opset = opset_of(model)
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise ModelError(
            f"opset {opset} is too {'old' if opset < OLDEST_OPSET else 'new'}; allowed are {OLDEST_OPSET} to {newest}",
            where=where,
        )


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the default operator set (1 where the model names none, as the format says)."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)


def _check_structure(model: onnx.ModelProto, where: str) -> None:
    import onnx

    if not model.graph.output:
        raise ModelError("the graph has no output", where=where)
    if not model.graph.node:
        raise ModelError("the graph has no nodes", where=where)
    if model.ByteSize() > PROTOBUF_LIMIT:
        raise ModelError("models over 2 GiB are not supported", where=where)
    # The checker insists on a shape for every input and output; runtimes do not, and models without are common.
    values = (*model.graph.input, *model.graph.output)
    tensors = [value.type.tensor_type for value in values if value.type.HasField("tensor_type")]
    unshaped = [tensor for tensor in tensors if not tensor.HasField("shape")]
    for tensor in unshaped:
        tensor.shape.SetInParent()
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"malformed or truncated model: {' '.join(str(error).split())}", where=where) from error
    finally:
        for tensor in unshaped:
            tensor.ClearField("shape")
