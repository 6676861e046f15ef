"""A module file: saved whole, loaded with the runtime only, refused when anything is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lpsn_tvm.artifact import Artifact, TensorInfo
from lpsn_tvm.errors import ArtifactError, LpsnError
from lpsn_tvm.library_artifact import LibraryArtifact
from lpsn_tvm.loading import load
from lpsn_tvm.recipe import Recipe
from lpsn_tvm.report import LayerRecord, Report

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """y = x + w, z = relu(y) for batches of two; w is a parameter with values of four bits."""
    from tvm import relax

    x, w = relax.Var("x", relax.TensorType((2, 8), "float32")), relax.Var("w", relax.TensorType((8,), "int8"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, w], {"num_input": 1}):
        with builder.dataflow():
            y = builder.emit(relax.op.add(x, relax.op.astype(w, "float32")))
            outputs = builder.emit_output(relax.Tuple([y, builder.emit(relax.op.nn.relu(y))]))
        builder.emit_func_output(outputs)
    path = tmp_path_factory.mktemp("library") / "library.so"
    relax.build(relax.transform.BundleModelParams()(builder.get()), "llvm").export_library(str(path))
    layer = LayerRecord("fc", "dense", (8, 8), (8, 4), (64, 32), (72, 36), 4, 8)
    totals = {
        "macs": (64.0, 32.0),
        "parameters": (72.0, 36.0),
        "weight_bytes": (288.0, 20.0),
        "activation_elements": (16.0, 8.0),
    }
    return LibraryArtifact(
        library=path.read_bytes(),
        params=[np.arange(-8, 0, dtype=np.int8)],
        inputs=[TensorInfo("x", (2, 8))],
        outputs=[TensorInfo("y", (2, 8)), TensorInfo("z", (2, 8))],
        recipe=Recipe(bits=(4, 8)),
        target="llvm",
        report=Report(
            "net",
            "llvm",
            (4, 8),
            [layer],
            totals,
            notes=["[brackets] stay"],
            milliseconds={"float": 2.0, "module": 1.0},
        ),
    )


@pytest.fixture
def saved(artifact: Artifact, tmp_path: Path) -> Path:
    return artifact.save(tmp_path / "net.lpsn")


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_batch_runs_in_pieces(artifact: Artifact, count: int) -> None:
    x = np.arange(count * 8, dtype=np.float32).reshape(count, 8) - 10
    result = artifact(x)
    assert isinstance(result, dict)
    np.testing.assert_array_equal(result["y"], x + np.arange(-8, 0))
    np.testing.assert_array_equal(result["z"], np.maximum(result["y"], 0))


class Pairs(LibraryArtifact):
    """Sums of two neighbouring samples, and of all."""

    def execute(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [arrays[0].reshape(2, 2, 8).sum(1), np.asarray(arrays[0].sum())][: len(self.outputs)]


def test_outputs_without_a_batch_axis_are_not_cut() -> None:
    infos = [TensorInfo("pairs", (2, 8)), TensorInfo("sum", ())]
    shared: dict[str, Any] = {"recipe": Recipe(), "report": Report(), "target": "llvm", "library": b"", "params": []}
    pairs = Pairs(inputs=[TensorInfo("x", (4, 8))], outputs=infos[:1], **shared)
    x = np.arange(64.0).reshape(8, 8)
    np.testing.assert_array_equal(pairs(x), x.reshape(4, 2, 8).sum(1))
    for count in (2, 6):
        with pytest.raises(LpsnError, match=r"'pairs': has shape \(2, 8\) for 4 samples.* a multiple of 4"):
            pairs(x[:count])
    both = Pairs(inputs=[TensorInfo("x", (4, 8))], outputs=infos, **shared)
    assert both(x[:4])["sum"] == x[:4].sum()
    with pytest.raises(LpsnError, match=r"'sum': has shape \(\) for 4 samples.*; run 4 at once"):
        both(x)


def test_call_forms_agree(artifact: Artifact) -> None:
    x = np.ones((2, 8), np.float32)
    for result in (artifact({"x": x}), artifact(x=x), artifact(x.tolist()), artifact(x.astype(np.float64))):
        np.testing.assert_array_equal(result["y"], artifact(x)["y"])


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "int64"])
def test_torch_tensors_on_the_host_are_read(artifact: Artifact, kind: str) -> None:
    x = torch.arange(16).reshape(2, 8).to(getattr(torch, kind))
    expected = artifact(np.arange(16.0).reshape(2, 8))["y"]
    np.testing.assert_array_equal(artifact(x)["y"], expected)
    if x.is_floating_point():
        np.testing.assert_array_equal(artifact(x.requires_grad_())["y"], expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda a: a([[1.0], [1.0, 2.0]]),
        lambda a: a(torch.ones(2, 8).to_sparse()),
        lambda a: a(torch.ones(2, 8, device="meta")),
        lambda a: a(np.ones((2, 7))),
        lambda a: a(np.ones((0, 8))),
        lambda a: a(),
        lambda a: a(np.ones((2, 8)), np.ones(3)),
        lambda a: a({"q": np.ones((2, 8))}),
        lambda a: a(np.array([["a"] * 8] * 2)),
        lambda a: a(np.ones((2, 8), complex)),
    ],
    ids=["ragged", "sparse", "meta", "width", "empty", "none", "two", "name", "text", "complex"],
)
def test_wrong_inputs_are_named(artifact: Artifact, call: object) -> None:
    with pytest.raises(LpsnError):
        call(artifact)  # type: ignore[operator]


def test_round_trip(artifact: Artifact, saved: Path) -> None:
    again = load(saved)
    x = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    np.testing.assert_array_equal(again(x)["z"], artifact(x)["z"])
    assert again.recipe == artifact.recipe
    assert again.report == artifact.report
    assert str(again.report) == str(artifact.report)
    assert "[brackets] stay" in str(again.report)
    with zipfile.ZipFile(saved) as archive:
        assert len(archive.read("params.bin")) == 4, "eight values of four bits"


def test_loads_without_compiler_torch_or_onnx(saved: Path) -> None:
    code = (
        "import sys, numpy as np, lpsn_tvm; m = lpsn_tvm.load(sys.argv[1]); y = m(np.ones((2, 8), np.float32))['y'];"
        "maps = open('/proc/self/maps').read() if sys.platform == 'linux' else '';"
        "print([n for n in ('tvm', 'torch', 'onnx', 'scipy') if n in sys.modules], 'libtvm_compiler' in maps, y[0, 0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.split() == ["[]", "False", "-7.0"]


def _altered(path: Path, name: str, change: object) -> None:
    """Rewrite one member, digests untouched."""
    with zipfile.ZipFile(path) as archive:
        contents = {entry: archive.read(entry) for entry in archive.namelist()}
    contents[name] = change(contents[name])  # type: ignore[operator]
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in contents.items():
            archive.writestr(entry, data)


def _redigest(path: Path) -> None:
    import hashlib

    with zipfile.ZipFile(path) as archive:
        lines = "".join(
            f"{hashlib.sha256(archive.read(n)).hexdigest()}  {n}\n"
            for n in ("manifest.json", "library.so", "params.bin")
        )
    _altered(path, "digest.txt", lambda _: lines.encode())


def _edit(key: str, value: object) -> object:
    return lambda data: json.dumps({**json.loads(data), key: value}).encode()


def test_altered_library_is_refused(saved: Path) -> None:
    _altered(saved, "library.so", lambda data: data[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"digest for library\.so"):
        load(saved)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 99, "newer|upgrade"),
        ("cpu_features", ["avx9000"], "avx9000"),
        ("machine", "vax", "vax"),
        ("params", None, "not a valid module"),
        ("inputs", [{}], "not a valid"),
    ],
    ids=["format", "cpu", "machine", "params", "inputs"],
)
def test_foreign_manifests_are_refused(saved: Path, key: str, value: object, message: str) -> None:
    _altered(saved, "manifest.json", _edit(key, value))
    _redigest(saved)
    with pytest.raises(ArtifactError, match=message):
        load(saved)


@pytest.mark.parametrize("keep", [0, 10, 400, -1])
def test_truncated_files_are_refused(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ArtifactError):
        load(saved)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        load(tmp_path / "nothing.lpsn")
    with pytest.raises(ArtifactError):
        load(tmp_path)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(ArtifactError, match="not a module"):
        load(tmp_path / "other.zip")


def test_a_failed_save_leaves_the_old_file(artifact: Artifact, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ArtifactError, match="No space left"):
        artifact.save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_unwritable_places(artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be written"):
        artifact.save(tmp_path / "no" / "such" / "folder.lpsn")
    with pytest.raises(ArtifactError, match="folder"):
        artifact.save(tmp_path)


def test_a_loaded_module_says_why_it_has_no_onnx(saved: Path) -> None:
    with pytest.raises(ArtifactError, match="build"):
        load(saved).to_onnx()
