"""load_model: what it accepts, what it refuses and how it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lpsn_tvm.errors import ModelError
from lpsn_tvm.frontend import load_model
from lpsn_tvm.frontend.simplify import static_shapes
from tests.support.onnx_nets import OnnxNet, max_error, random_feeds, run_onnx


def small(*shape: Any, **options: Any) -> onnx.ModelProto:
    net = OnnxNet()
    x = net.input("x", *(shape or ("N", 3, 8, 8)))
    c = net.add("Conv", x, net.weight(4, 3, 3, 3), net.weight(4), name="conv")
    return net.model(net.add("Relu", c, name="relu"), **options)


def shape_of(model: onnx.ModelProto, name: str = "x") -> tuple[int, ...]:
    return static_shapes(model)[name]


@pytest.mark.parametrize("form", ["path", "str", "bytes", "proto"])
def test_accepts_every_form(form: str, tmp_path: Path) -> None:
    model = small()
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    source = {"path": path, "str": str(path), "bytes": model.SerializeToString(), "proto": model}[form]
    assert [node.name for node in load_model(source).graph.node] == ["conv", "relu"]


def test_reads_external_data(tmp_path: Path) -> None:
    onnx.save(small(), tmp_path / "net.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    weights = load_model(tmp_path / "net.onnx").graph.initializer
    np.testing.assert_array_equal(
        numpy_helper.to_array(weights[0]), numpy_helper.to_array(small().graph.initializer[0])
    )
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match="external data of tensor"):
        load_model(tmp_path / "net.onnx")
    with pytest.raises(ModelError, match="give the path instead"):
        load_model((tmp_path / "net.onnx").read_bytes())


def test_does_not_change_the_users_model() -> None:
    model = small()
    before = model.SerializeToString()
    load_model(model)
    assert model.SerializeToString() == before


def broken(name: str, tmp_path: Path) -> Any:
    data = small().SerializeToString()
    if name == "truncated":
        return data[: len(data) // 2]
    if name == "truncated-at-a-field":
        model = small()
        del model.graph.initializer[:]
        return model.SerializeToString()
    if name == "text":
        (tmp_path / "notes.onnx").write_text("this is not a model")
        return tmp_path / "notes.onnx"
    if name == "no-output":
        model = small()
        del model.graph.output[:]
        return model
    if name == "unknown-value":
        model = small()
        model.graph.node[0].input[0] = "nothing"
        return model
    return {
        "missing": tmp_path / "none.onnx",
        "folder": tmp_path,
        "empty": b"",
        "number": 3,
        "old-opset": small(opset=6),
        "new-opset": small(opset=onnx.defs.onnx_opset_version() + 1),
        "new-ir": small(ir_version=onnx.IR_VERSION + 1),
    }[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "no such file"),
        ("folder", "is a folder"),
        ("text", "not an ONNX model"),
        ("empty", "not an ONNX model"),
        ("truncated", "truncated"),
        ("truncated-at-a-field", "malformed or truncated"),
        ("number", "not int"),
        ("old-opset", "opset 6 is too old"),
        ("new-opset", "too new; allowed are 7 to"),
        ("new-ir", "IR version"),
        ("no-output", "no output"),
        ("unknown-value", "malformed"),
    ],
)
def test_refuses(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(broken(name, tmp_path))


@pytest.mark.parametrize("cut", [0.03, 0.2, 0.6, 0.9, 0.99])
def test_refuses_any_truncation(cut: float) -> None:
    data = small().SerializeToString()
    with pytest.raises(ModelError):
        load_model(data[: int(len(data) * cut)])


def test_batch_fixes_the_first_dimension() -> None:
    assert shape_of(load_model(small())) == (1, 3, 8, 8)
    loaded = load_model(small(), batch=4)
    assert shape_of(loaded) == (4, 3, 8, 8)
    assert shape_of(loaded, "relu") == (4, 4, 6, 6)


def test_other_dynamic_dimensions_need_input_shapes() -> None:
    model = small("N", 3, "H", None)
    with pytest.raises(
        ModelError, match=r"input 'x': dimension 2 \(H\) is dynamic: \[N, 3, H, \?\]; fix it with input_shapes"
    ):
        load_model(model)
    assert shape_of(load_model(model, input_shapes={"x": (2, 3, 16, 12)})) == (2, 3, 16, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shapes": {"y": (1, 3, 8, 8)}}, "no input 'y'; its inputs are x"),
        ({"input_shapes": {"x": (1, 3, 8)}}, "has 3 dimensions, the model's input has 4"),
        ({"input_shapes": {"x": (1, 4, 8, 8)}}, "dimension 1 is 3 in the model"),
        ({"input_shapes": {"x": (1, 3, 0, 8)}}, "is not a shape"),
        ({"batch": 0}, "batch must be an integer"),
    ],
)
def test_refuses_wrong_shapes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(small(), **options)


def test_a_static_batch_cannot_change() -> None:
    with pytest.raises(ModelError, match="batch is fixed to 1"):
        load_model(small(1, 3, 8, 8), batch=4)


def test_inputs_of_unknown_rank_need_a_shape() -> None:
    model = small()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(ModelError, match="rank is not known"):
        load_model(model)
    assert shape_of(load_model(model, input_shapes={"x": (1, 3, 8, 8)}), "relu") == (1, 4, 6, 6)


def test_symbols_are_shared_between_inputs() -> None:
    net = OnnxNet()
    a, b = net.input("a", "N", 3, "H", "W"), net.input("b", "N", 3, "H", "W")
    model = net.model(net.add("Add", a, b))
    loaded = load_model(model, input_shapes={"a": (1, 3, 5, 6)})
    assert shape_of(loaded, "b") == (1, 3, 5, 6)
    with pytest.raises(ModelError, match="in another input"):
        load_model(model, input_shapes={"a": (1, 3, 5, 6), "b": (1, 3, 5, 7)})


def test_initializers_listed_as_inputs_are_weights() -> None:
    model = small(ir_version=3)
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    assert [value.name for value in load_model(model).graph.input] == ["x"]
    assert max_error(model) < 1e-5


def test_weights_in_constant_nodes() -> None:
    model = small()
    nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in model.graph.initializer]
    original = list(model.graph.node)
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend([*nodes, *original])
    assert max_error(model) < 1e-5


def test_names_are_unique_and_never_empty() -> None:
    net = OnnxNet()
    x = net.input("x", 1, 3, 4, 4)
    a = net.add("Relu", x, name="same")
    b = net.add("Tanh", a, name="other")
    c = net.add("Sigmoid", b, name="last")
    model = net.model(c)
    model.graph.node[1].name = "same"
    model.graph.node[2].name = ""
    assert [node.name for node in load_model(model).graph.node] == ["same", "same_1", "last"]
    model.graph.node[0].name = "x"
    assert load_model(model).graph.node[0].name == "x_1"


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE], ids=["float16", "float64"])
def test_other_float_types_become_float32(kind: int) -> None:
    model = small(1, 3, 8, 8)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    loaded = load_model(model)
    assert {tensor.data_type for tensor in loaded.graph.initializer} == {TensorProto.FLOAT}
    feeds = random_feeds(loaded)
    np.testing.assert_allclose(run_onnx(loaded, feeds)[0], run_onnx(small(1, 3, 8, 8), feeds)[0], atol=5e-3)


def test_integer_images_that_are_cast_first() -> None:
    net = OnnxNet()
    x = net.input("x", 1, 3, 8, 8, kind=TensorProto.UINT8)
    scaled = net.add("Mul", net.add("Cast", x, to=TensorProto.FLOAT), net.const(1 / 255))
    model = net.model(net.add("Conv", scaled, net.weight(4, 3, 3, 3)))
    loaded = load_model(model)
    assert loaded.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 8, 8), dtype=np.uint8)
    np.testing.assert_allclose(
        run_onnx(loaded, {"x": image.astype(np.float32)})[0], run_onnx(model, {"x": image})[0], rtol=1e-6
    )


def test_integer_inputs_used_otherwise_are_refused() -> None:
    net = OnnxNet()
    index = net.input("index", 2, kind=TensorProto.INT64)
    model = net.model(net.add("Gather", net.weight(5, 3), index))
    with pytest.raises(ModelError, match="index: input of type int64"):
        load_model(model)


def test_an_input_the_network_cannot_take() -> None:
    net = OnnxNet()
    x = net.input("x", "N", 3, "H", "W")
    flat = net.add("Flatten", net.add("Relu", x))
    model = net.model(net.add("Gemm", flat, net.weight(48, 5)))
    assert max_error(model, input_shapes={"x": (1, 3, 4, 4)}) < 1e-5
    with pytest.raises(ModelError, match=r"shape inference failed|cannot be converted"):
        from lpsn_tvm.frontend import import_model

        import_model(load_model(model, input_shapes={"x": (1, 3, 5, 5)}))
