"""The command line: options parsed, errors on one line with status 2, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lpsn_tvm.cli import _pair, _shapes, _sparsity, app
from lpsn_tvm.errors import LpsnError

MODEL = Path(__file__).resolve().parents[1] / "tutorials" / "models" / "espcn_x2.onnx"
runner = CliRunner()


@pytest.mark.parametrize(("text", "expected"), [("8", 8), ("4,8", (4, 8)), ("float", None)])
def test_bits(text: str, expected: object) -> None:
    assert _pair(text) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["0.5"], 0.5),
        (["auto"], "auto"),
        (["none"], None),
        (["/a/Conv=0.5", "b=0.25"], {"/a/Conv": "0.5", "b": "0.25"}),
    ],
    ids=str,
)
def test_sparsity(values: list[str], expected: object) -> None:
    assert _sparsity(values) == expected


def test_shapes() -> None:
    assert _shapes(["input=1x3x8x8", "b=1,2"]) == {"input": (1, 3, 8, 8), "b": (1, 2)}


@pytest.mark.parametrize(
    "call",
    [
        lambda: _pair("a"),
        lambda: _pair("1,2,3"),
        lambda: _sparsity(["x"]),
        lambda: _sparsity(["a=1", "b"]),
        lambda: _shapes(["1x3"]),
    ],
)
def test_bad_options(call: object) -> None:
    with pytest.raises(LpsnError, match="--"):
        call()  # type: ignore[operator]


def test_build_run_inspect(tmp_path: Path) -> None:
    np.save(tmp_path / "patches.npy", np.random.default_rng(0).random((8, 1, 16, 16), dtype=np.float32))
    module, qdq = tmp_path / "net.lpsn", tmp_path / "net.onnx"
    arguments = [
        str(MODEL),
        "--calibration",
        str(tmp_path / "patches.npy"),
        "--input-shape",
        "input=1x1x16x16",
        "--bits",
        "4,8",
        "--sparsity",
        "0.5",
    ]
    done = runner.invoke(app, ["build", *arguments, "-o", str(module), "--onnx", str(qdq), "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert answer["bytes"] == module.stat().st_size
    assert answer["report"]["milliseconds"]["module"] > 0
    assert qdq.exists()

    done = runner.invoke(app, ["inspect", str(module), "--json"])
    assert json.loads(done.stdout)["recipe"]["bits"] == [4, 8]
    done = runner.invoke(app, ["inspect", str(module)])
    assert done.exit_code == 0
    assert "Totals" in done.stdout

    np.save(tmp_path / "x.npy", np.zeros((2, 1, 16, 16), np.float32))
    done = runner.invoke(app, ["run", str(module), str(tmp_path / "x.npy"), "-o", str(tmp_path / "y.npz")])
    assert done.exit_code == 0, done.output
    assert np.load(tmp_path / "y.npz")["output"].shape == (2, 1, 32, 32)


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "nothing.onnx", "-o", "x.lpsn"],
        ["build", str(MODEL), "-o", "no/such/folder/x.lpsn"],
        ["build", str(MODEL), "-o", "x.lpsn", "--bits", "9"],
        ["build", str(MODEL), "-o", "x.lpsn", "--sparsity", "1.0"],
        ["build", str(MODEL), "-o", "x.lpsn", "--target", "abacus"],
        ["build", str(MODEL), "-o", "x.lpsn"],
        ["inspect", "nothing.lpsn"],
        ["run", "nothing.lpsn", "x.npy"],
    ],
    ids=["missing model", "missing folder", "bits", "sparsity", "target", "dynamic size", "inspect", "run"],
)
def test_errors_are_one_line(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = runner.invoke(app, arguments)
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    assert "Error: " in done.output
    assert not list(tmp_path.iterdir()), "nothing is left half-written"
    as_json = runner.invoke(app, [*arguments, "--json"])
    assert as_json.exit_code == 2
    assert json.loads(as_json.stdout.strip().splitlines()[-1])["message"]
