"""Models as users bring them: quantized by ONNX Runtime, channels last, several inputs and outputs, external data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_nets import OnnxNet, run_onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import lpsn_tvm

RNG = np.random.default_rng(0)
X = RNG.random((32, 3, 12, 12)).astype(np.float32)


def build(model: Any, **options: Any) -> Any:
    return lpsn_tvm.build(model, **{"measure": False, **options})


def classifier() -> onnx.ModelProto:
    n = OnnxNet()
    x = n.add("Conv", n.input("x", "N", 3, 12, 12), n.weight(16, 3, 3, 3), n.const(RNG.random(16)), name="c1")
    x = n.add("Relu", x)
    y = n.add("Relu", n.add("Conv", x, n.weight(16, 16, 3, 3), n.const(RNG.random(16)), name="c2", pads=[1] * 4))
    y = n.add("Flatten", n.add("GlobalAveragePool", n.add("Add", x, y)))
    return n.model(n.add("Gemm", y, n.weight(16, 10), n.const(np.arange(10.0)), name="fc"), opset=13)


class Reader(CalibrationDataReader):
    def __init__(self) -> None:
        self.items = iter(X)

    def get_next(self) -> dict[str, Any] | None:
        item = next(self.items, None)
        return None if item is None else {"x": item[None]}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qdq")
    onnx.save(classifier(), folder / "float.onnx")
    quantize_static(
        folder / "float.onnx", folder / "qdq.onnx", Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return folder / "qdq.onnx"


@pytest.mark.filterwarnings("ignore:no calibration data")
@pytest.mark.parametrize("has_data", [True, False], ids=["data", "no data"])
def test_qdq_model_keeps_its_scales(quantized: Path, has_data: bool) -> None:
    """Also on synthetic inputs, which must not shift the biases of a model that was quantized on real ones."""
    module = build(quantized, calibration=X if has_data else None, sparsity=None)
    want = run_onnx(onnx.load(quantized), {"x": X})[0]
    assert np.abs(module(X) - want).max() < 0.02 * np.ptp(want)
    assert any("scales of the model's own" in note for note in module.report.notes)


def test_channels_last() -> None:
    n = OnnxNet()
    x = n.add("Transpose", n.input("input_1:0", "unk__0", 12, 12, 3), perm=[0, 3, 1, 2])
    name = "StatefulPartitionedCall/model/conv/Conv2D"
    y = n.add("Conv", x, n.weight(16, 3, 3, 3), name=name, auto_pad="SAME_UPPER", strides=[2, 2])
    y = n.add("Transpose", n.add("Relu", y), perm=[0, 2, 3, 1])
    y = n.add("Add", n.add("Mul", y, n.const(np.linspace(0.5, 1.5, 16))), n.const(np.linspace(-1, 1, 16)))
    y = n.add("Conv", n.add("Transpose", y, perm=[0, 3, 1, 2]), n.weight(24, 16, 1, 1), name="pw")
    y = n.add("ReduceMean", n.add("Transpose", y, perm=[0, 2, 3, 1]), axes=[1, 2], keepdims=0)
    y = n.add("MatMul", y, n.weight(24, 10), name="fc/MatMul")
    y = n.add("Add", y, n.const(np.arange(10) / 10), name="fc/BiasAdd")
    model = n.model(n.add("Softmax", y, axis=-1, name="probs"), opset=13)
    data = X.transpose(0, 2, 3, 1)
    want = run_onnx(model, {"input_1:0": data})[0]
    for bits, tolerance in ((None, 1e-5), (8, 0.01)):
        module = build(model, calibration=data, bits=bits, sparsity=None)
        assert np.abs(module(data) - want).max() < tolerance
    assert "probs" in module.report.float_nodes
    assert {name, "fc/MatMul"} <= {layer.name for layer in module.report.layers}


def test_two_inputs_and_outputs(tmp_path: Path) -> None:
    n = OnnxNet()
    x = n.add("Conv", n.input("a", 1, 3, 12, 12), n.weight(8, 3, 3, 3), name="ca", pads=[1] * 4)
    y = n.add("Conv", n.input("b.0", 1, 2, 12, 12), n.weight(8, 2, 3, 3), name="cb", pads=[1] * 4)
    z = n.add("Relu", n.add("Add", x, y))
    model = n.model(n.add("Conv", z, n.weight(4, 8, 1, 1), name="p"), n.add("GlobalAveragePool", z, name="g"))
    data = {"a": X, "b.0": X[:, :2]}
    one = {name: value[:1] for name, value in data.items()}
    want = dict(zip(("p", "g"), run_onnx(model, one), strict=True))
    module = build(model, calibration=data, sparsity=None)
    result = module(one)
    assert list(result) == ["p", "g"]
    for name, value in want.items():
        assert np.abs(result[name] - value).max() < 0.05 * np.ptp(value) + 1e-3
        np.testing.assert_array_equal(module(*one.values())[name], result[name])
        np.testing.assert_array_equal(lpsn_tvm.load(module.save(tmp_path / "m.lpsn"))(**one)[name], result[name])
    items = [(data["a"][i : i + 4], data["b.0"][i : i + 4]) for i in range(0, 32, 4)]
    pairs = build(model, calibration=items, sparsity=None)
    np.testing.assert_array_equal(pairs(one)["p"], result["p"])


def test_external_data_and_ignored_layers(tmp_path: Path) -> None:
    onnx.save_model(
        classifier(), tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    options = {"sparsity": 0.5, "align": 1, "ignore": ["c1", "f*"], "batch": 4, "num_threads": 1}
    module = build(tmp_path / "m.onnx", calibration=X, **options)
    kept = {layer.name: layer.kept_float for layer in module.report.layers}
    assert kept == {"c1": "kept at float on request", "c2": "", "fc": "kept at float on request"}
    assert module(X[:6]).shape == (6, 10)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(lpsn_tvm.errors.ModelError, match="external data"):
        build(tmp_path / "m.onnx")


def test_nothing_but_bits_warns() -> None:
    with pytest.warns(UserWarning, match="no calibration data"):
        module = lpsn_tvm.build(classifier(), target="llvm", bits=4, measure=False)
    assert any("synthetic" in note for note in module.report.notes)
    assert module.report.calibration["synthetic"]
