"""The module of the accelerator: the same surface as any other, saved whole, run without tvm, torch and onnx."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from vta_nets import HEIGHT, WIDTH, Pointwise, assembled, split

from lpsn_tvm import load
from lpsn_tvm.artifact import TensorInfo
from lpsn_tvm.errors import ArtifactError, LpsnError
from lpsn_tvm.recipe import Recipe
from lpsn_tvm.report import Report
from lpsn_tvm.targets.vta.artifact import VtaArtifact
from lpsn_tvm.targets.vta.config import PRESETS

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def net() -> Pointwise:
    return split(PRESETS["pynq"])


@pytest.fixture(scope="module")
def artifact(net: Pointwise) -> VtaArtifact:
    network = assembled(net.lowered("d", "c"))
    module = VtaArtifact(
        inputs=network.inputs,
        outputs=[
            TensorInfo("first", (1, 33, HEIGHT, WIDTH), "int8"),
            TensorInfo("second", (1, 16, HEIGHT, WIDTH), "int8"),
        ],
        recipe=Recipe(target="vta"),
        report=Report("net", "vta", (8, 8)),
        target="vta -preset=pynq -model=pynq",
        network=network,
    )
    module.report.accelerator = module.profile()
    return module


@pytest.fixture
def saved(artifact: VtaArtifact, tmp_path: Path) -> Path:
    return artifact.save(tmp_path / "net.lpsn")


@pytest.mark.parametrize("count", [1, 3])
def test_any_batch_runs_in_pieces(artifact: VtaArtifact, net: Pointwise, count: int) -> None:
    x = np.concatenate([net.feed() for _ in range(count)])
    result = artifact(x)
    assert isinstance(result, dict)
    for index in range(count):
        expected = net.evaluate(x[index : index + 1])
        np.testing.assert_array_equal(result["first"][index : index + 1], expected["d"])
        np.testing.assert_array_equal(result["second"][index : index + 1], expected["c"])


def test_simulation_counts_layer_by_layer(artifact: VtaArtifact, net: Pointwise) -> None:
    x = net.feed()
    run = artifact.simulate(x, model="rtl")
    np.testing.assert_array_equal(run.outputs["first"], net.evaluate(x)["d"])
    assert list(run.layers) == ["a", "b", "c", "d"]
    assert sum(run.layers.values()) == run.cycles == artifact.profile().cycles["rtl"]
    assert run.milliseconds == artifact.milliseconds("rtl") == run.cycles / 1e5
    assert run.counters["gemm_uops"] > 0
    assert artifact.cycles == artifact.simulate(x).cycles > run.cycles
    assert artifact.benchmark() == artifact.milliseconds("pynq")
    assert all(result.timeline is not None for result in run.programs)
    with pytest.raises(ArtifactError, match="one batch of 1"):
        artifact.simulate(np.concatenate([x, x]))


def test_round_trip(artifact: VtaArtifact, saved: Path, net: Pointwise) -> None:
    again = load(saved)
    assert isinstance(again, VtaArtifact)
    x = net.feed()
    for name, value in artifact(x).items():
        np.testing.assert_array_equal(again(x)[name], value)
    assert (again.recipe, again.report, again.cycles) == (artifact.recipe, artifact.report, artifact.cycles)
    text = str(again.report)
    assert "1x16_i8w8a32_15_15_18_17" in text and "a test" in text
    assert again.details()["config"]["LOG_WGT_BUFF_SIZE"] == 18


def test_runs_without_tvm_torch_and_onnx(saved: Path) -> None:
    code = (
        f"import sys, numpy as np, lpsn_tvm; m = lpsn_tvm.load(sys.argv[1]); m(np.ones((1, 20, {HEIGHT}, {WIDTH})));"
        "print([n for n in ('tvm', 'tvm_ffi', 'torch', 'onnx', 'scipy') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def _rewritten(path: Path, drop: str = "", change: str = "") -> None:
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist() if name != drop}
    if change:
        contents[change] = contents[change][:-1] + bytes([contents[change][-1] ^ 1])
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"change": "program0/insn.bin"}, r"digest for program0/insn\.bin"),
        ({"drop": "program0/weight.bin"}, r"lost program0/weight\.bin"),
        ({"change": "manifest.json"}, "digest for manifest"),
    ],
    ids=["altered", "lost", "manifest"],
)
def test_damaged_files_are_refused(saved: Path, options: dict[str, str], message: str) -> None:
    _rewritten(saved, **options)
    with pytest.raises(ArtifactError, match=message):
        load(saved)


def test_unknown_kinds_are_refused(artifact: VtaArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VtaArtifact, "kind", "abacus")
    artifact.save(tmp_path / "net.lpsn")
    with pytest.raises(ArtifactError, match="abacus"):
        load(tmp_path / "net.lpsn")


def test_wrong_inputs_are_named(artifact: VtaArtifact) -> None:
    for call in (lambda: artifact(np.ones((1, 3, 4, 4))), lambda: artifact(), lambda: artifact(y=np.ones(3))):
        with pytest.raises(LpsnError):
            call()


def test_unwritable_places(artifact: VtaArtifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be written"):
        artifact.save(tmp_path / "no" / "such" / "folder.lpsn")
