"""Whatever a user can get wrong, through `build`: one clear error that names what and where, nothing left behind."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx_nets import OnnxNet

import lpsn_tvm
from lpsn_tvm.errors import (
    ArtifactError,
    CalibrationError,
    LpsnError,
    ModelError,
    RecipeError,
    TargetError,
    UnsupportedOpError,
)

pytestmark = pytest.mark.filterwarnings("ignore:no calibration data")
X = np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32)
Extra = Callable[[OnnxNet, str], str]


def net(
    shape: tuple[Any, ...] = (1, 3, 8, 8), opset: int = 17, factor: float = 1.0, extra: Extra | None = None
) -> onnx.ModelProto:
    n = OnnxNet()
    n.input("x", *shape)
    first, second = n.rng.standard_normal((8, 3, 3, 3)) / 5, n.rng.standard_normal((8, 8, 3, 3)) / 9
    y = n.add("Conv", "x", n.const(first * factor), n.const(np.zeros(8)), name="c1", pads=[1] * 4)
    y = n.add("Conv", n.add("Relu", y), n.const(second * factor), n.const(np.zeros(8)), name="c2", pads=[1] * 4)
    return n.model(extra(n, y) if extra else y, opset=opset)


MODEL = net().SerializeToString()


def build(model: Any = MODEL, **options: Any) -> Any:
    return lpsn_tvm.build(model, **{"measure": False, **options})


MODELS: dict[str, tuple[Any, type[LpsnError], str]] = {
    "garbage": (b"hello world", ModelError, "not an ONNX model"),
    "empty": (b"", ModelError, "not an ONNX model"),
    "half": (MODEL[: len(MODEL) // 2], ModelError, "truncated"),
    "last bytes missing": (MODEL[:-3], ModelError, "truncated"),
    "no file": ("nowhere.onnx", ModelError, "nowhere.onnx: there is no such file"),
    "not a model": (5, ModelError, "not int"),
    "opset 5": (net(opset=5), ModelError, "opset 5 is too old; allowed are 7 to"),
    "opset 99": (net(opset=99), ModelError, "opset 99 is too new"),
    "unknown operator": (
        net(extra=lambda n, y: n.add("NonZero", y, name="nz")),
        UnsupportedOpError,
        "'nz'.*NonZero.*ai.onnx",
    ),
    "unfixed size": (net(("N", 3, "H", 8)), ModelError, r"'x': dimension 2 \(H\) is dynamic.*input_shapes"),
    "no channels": (net(("N", "C", 8, 8)), ModelError, "dimension 1"),
    "image too small": (
        net((1, 3, 1, 1), extra=lambda n, y: n.add("MaxPool", y, name="mp", kernel_shape=[3, 3])),
        ModelError,
        "'mp'.*no elements.*too small",
    ),
    "NaN weights": (net(factor=np.nan), ModelError, "'c1'.*not finite"),
    "infinite weights": (net(factor=np.inf), ModelError, "'c1'.*not finite"),
    "constant output": (
        net(extra=lambda n, y: n.add("Identity", n.const([1.0]), name="z")),
        ModelError,
        "'z'.*not depend",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(case: str) -> None:
    model, error, message = MODELS[case]
    with pytest.raises(error, match=message):
        build(model)


def test_folder_as_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder"):
        build(tmp_path)


def test_foreign_domain() -> None:
    model = net(extra=lambda n, y: n.add("Foo", y, name="foo1", domain="my.domain"))
    model.opset_import.append(onnx.helper.make_opsetid("my.domain", 1))
    with pytest.raises(UnsupportedOpError, match=r"foo1.*Foo.*my\.domain"):
        build(model)


OPTIONS: dict[str, tuple[dict[str, Any], type[LpsnError], str]] = {
    **{
        f"bits {bits!r}": ({"bits": bits}, RecipeError, r"bits: must be 2\.\.8")
        for bits in (1, 9, 16, "8", (8,), (8, 9), 4.0, True)
    },
    **{
        f"sparsity {s!r}": ({"sparsity": s}, RecipeError, "sparsity: must be a fraction")
        for s in (1.0, -0.1, "half", float("nan"))
    },
    "sparsity of a layer": ({"sparsity": {"c1": 1.0}}, RecipeError, r"sparsity\['c1'\]"),
    "unknown option": ({"sparsty": 0.5}, RecipeError, "sparsty: unknown option; did you mean 'sparsity'"),
    "unknown layer": ({"ignore": ["c9"]}, RecipeError, "ignore: .*'c9'; close matches: c"),
    "unknown layer, float": ({"ignore": ["c9"], "bits": None, "sparsity": None}, RecipeError, "ignore: .*'c9'"),
    "unknown layer in sparsity": ({"sparsity": {"c9": 0.5}}, RecipeError, "sparsity: .*'c9'"),
    "unknown target": ({"target": "gpu"}, TargetError, "gpu"),
    "empty target": ({"target": ""}, TargetError, "target"),
    "unknown mcpu": ({"target": "llvm -mcpu=nonsense"}, TargetError, "nonsense"),
    "input rank": ({"input_shapes": {"x": (1, 3)}}, ModelError, r"input_shapes\['x'\].*2 dimensions"),
    "input name": ({"input_shapes": {"y": (1, 3, 8, 8)}}, ModelError, "no input 'y'; its inputs are x"),
    "fixed dimension": ({"input_shapes": {"x": (1, 4, 8, 8)}}, ModelError, "cannot become 4"),
    "batch": ({"batch": 0}, RecipeError, "batch: must be an integer of at least 1"),
    "threads": ({"num_threads": 0}, RecipeError, "num_threads"),
    "measure": ({"measure": "yes"}, RecipeError, "measure: must be True or False"),
    "progress": ({"progress": "yes"}, RecipeError, "progress: must be"),
}


@pytest.mark.parametrize("has_data", [True, False], ids=["data", "no data"])
@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str, has_data: bool) -> None:
    options, error, message = OPTIONS[case]
    with pytest.raises(error, match=message):
        build(calibration=X if has_data else None, **options)


def spoilt(value: float) -> np.ndarray:
    data = X.copy()
    data[3, 0, 0, 0] = value
    return data


CALIBRATION: dict[str, tuple[dict[str, Any], str]] = {
    "NaN": ({"calibration": spoilt(np.nan)}, "x: sample 3 has NaN"),
    "infinite": ({"calibration": spoilt(np.inf)}, "x: sample 3 has infinite"),
    "huge": ({"calibration": X * 1e30}, "x: .*overflow float32; allowed is up to 1e"),
    "empty": ({"calibration": X[:0]}, "empty"),
    "empty list": ({"calibration": []}, "empty"),
    "shape": ({"calibration": X[:, :, :4]}, r"x: samples have shape \(3, 4, 8\).*expects \(3, 8, 8\)"),
    "layout": ({"calibration": X.transpose(0, 2, 3, 1)}, "looks like NHWC"),
    "strings": ({"calibration": X.astype(str)}, "x: data of type"),
    "name": ({"calibration": {"y": X}}, "missing x; unknown y"),
    "number": ({"calibration": 7}, "int is no calibration data"),
    "file": ({"calibration": "nowhere.npy"}, "nowhere.npy: no such file"),
    "mean": ({"calibration": X, "preprocessing": {"mean": [1, 2]}}, "x: mean has 2 values, the input has 3"),
    "mean of text": (
        {"calibration": X, "preprocessing": {"mean": "a"}},
        "x: mean of preprocessing is not made of numbers",
    ),
    "std": ({"calibration": X, "preprocessing": {"std": 0}}, "x: std .*positive"),
    "key": ({"calibration": X, "preprocessing": {"men": 0}}, "men; allowed are mean, std"),
    "list": ({"calibration": X, "preprocessing": [1]}, "preprocessing is list"),
    "function": ({"calibration": X, "preprocessing": lambda x: 1 / 0}, "preprocessing failed: ZeroDivisionError"),
    "range": ({"calibration": X, "input_range": (1, 0)}, "input_range is"),
    "range of one": ({"calibration": X, "input_range": 5}, "input_range is 5; two finite numbers"),
}


@pytest.mark.parametrize("case", CALIBRATION)
def test_calibration(case: str) -> None:
    options, message = CALIBRATION[case]
    with pytest.raises(CalibrationError, match=message):
        build(**options)


def test_calibration_folders(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no images found"):
        build(calibration=tmp_path)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(CalibrationError, match=r"a\.png: not a readable image"):
        build(calibration=tmp_path)


ODD: dict[str, tuple[Any, dict[str, Any]]] = {
    "constant data": (MODEL, {"calibration": np.ones_like(X), "bits": 4}),
    "zeros": (MODEL, {"calibration": np.zeros_like(X), "sparsity": 0.5, "align": 1, "bits": (2, 3)}),
    "one sample": (MODEL, {"calibration": X[0], "sparsity": 0.5, "align": 1}),
    "large": (MODEL, {"calibration": X * 1e11, "bits": 4}),
    "tiny": (MODEL, {"calibration": X * 1e-30, "bits": 4}),
    "zero weights": (net(factor=0.0), {"calibration": X, "sparsity": 0.5, "align": 1, "bits": (3, 4)}),
    "zero weights, no data": (net(factor=0.0), {}),
    "unknown batch written as 0": (net((0, 3, 8, 8)), {"calibration": X}),
    "empty sparsity": (MODEL, {"calibration": X, "sparsity": {}}),
    "ignore all": (MODEL, {"calibration": X, "ignore": "*"}),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_but_fine(case: str) -> None:
    model, options = ODD[case]
    result = build(model, **options)(X)
    assert result.shape == (8, 8, 8, 8)
    assert np.isfinite(result).all()


@pytest.mark.parametrize("bits", [None, 8, (2, 3)])
def test_no_convolution(bits: Any) -> None:
    n = OnnxNet()
    y = n.add("MaxPool", n.add("Relu", n.input("x", 1, 3, 8, 8)), kernel_shape=[2, 2], strides=[2, 2])
    want = np.maximum(X, 0).reshape(8, 3, 4, 2, 4, 2).max(axis=(3, 5))
    np.testing.assert_allclose(build(n.model(y), bits=bits, calibration=X)(X), want, atol=1e-6 if bits is None else 0.5)


def test_integer_input_is_taken_as_float() -> None:
    n = OnnxNet()
    y = n.add("Cast", n.input("x", 1, 3, kind=TensorProto.INT64), to=TensorProto.FLOAT)
    module = build(n.model(n.add("Relu", y)), bits=None)
    assert module(np.array([[-1, 2, 3]])).tolist() == [[0.0, 2.0, 3.0]]


def test_unwritable_output(tmp_path: Path) -> None:
    module = build(calibration=X)
    for path in (tmp_path / "missing" / "net.lpsn", tmp_path):
        with pytest.raises(ArtifactError, match=str(path)):
            module.save(path)
        with pytest.raises(ArtifactError, match=str(path)):
            module.to_onnx(path)
    assert list(tmp_path.iterdir()) == []


def test_interrupts_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen: list[str] = []
    options = {"calibration": X, "sparsity": 0.5, "align": 1, "bits": 4}
    build(progress=lambda stage, done, total: seen.append(stage), **options)
    assert {"prune", "quantize", "compile"} <= set(seen)
    for stop in range(1, len(seen) + 1, 3):
        count = iter(range(1, len(seen) + 2))

        def interrupt(stage: str, done: int, total: int, stop: int = stop, count: Any = count) -> None:
            if next(count) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(progress=interrupt, **options)
    assert list(tmp_path.iterdir()) == []
