"""Bundles on a fake board: right results, and one clear line for everything that goes wrong there."""

from __future__ import annotations

import ast
import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from board_process import Board, board
from vta_nets import Pointwise, assembled, split

from lpsn_tvm.errors import ArtifactError
from lpsn_tvm.targets.vta.board import runner
from lpsn_tvm.targets.vta.config import PRESETS, VtaConfig
from lpsn_tvm.targets.vta.pynq import BOARD_FILES, export_pynq
from lpsn_tvm.targets.vta.simulated_board import run_bundle

Bundles = dict[str, tuple[Pointwise, Path]]


class Cache(dict[str, Any]):
    """A bundle of the test network per preset, made when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, name: str) -> tuple[Pointwise, Path]:
        net = split(PRESETS[name])
        path = self.folder / f"{name}.zip"
        export_pynq(assembled(net.lowered("d", "c")), path, sample={"x": net.feed()}, output_names=["first", "second"])
        self[name] = (net, path)
        return self[name]


def slow(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    return Cache(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def on_pynq(bundles: Bundles, tmp_path: Path) -> Board:
    return board(bundles["pynq"][1], tmp_path, PRESETS["pynq"])


def _message(result: Any) -> str:
    """The one line of an error."""
    assert result.returncode == 2, result.stdout + result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return str(lines[0])


@pytest.mark.parametrize("name", ["pynq", "pynq-0.0.2", "pynq-i4", *map(slow, ("ultra96", "pynq-4x8"))])
def test_network_on_the_board_equals_numpy(name: str, bundles: Bundles, tmp_path: Path) -> None:
    net, path = bundles[name]
    device = board(path, tmp_path, PRESETS[name], part="xczu3eg-sbva484-1-e" if name == "ultra96" else "7z020clg484")
    x = np.concatenate([net.feed() for _ in range(3)])
    np.save(tmp_path / "x.npy", x)
    result = device.run("--self-test", "--input", "x.npy", "--output", "y.npz", compiled=name == "pynq")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("ok: ") == 3
    assert "accelerator" in result.stdout
    outputs = np.load(tmp_path / "y.npz")
    for index in range(3):
        expected = net.evaluate(x[index : index + 1])
        np.testing.assert_array_equal(outputs["first"][index : index + 1], expected["d"])
        np.testing.assert_array_equal(outputs["second"][index : index + 1], expected["c"])
    assert f"clock {PRESETS[name].clock_mhz:g}" in device.log
    # Version 0.0.2 hangs in the probe, by design, and is reset; nothing else may go wrong.
    resets = 2 if PRESETS[name].isa_version == "0.0.2" else 1
    assert device.log.count("download vta.bit") == resets
    assert sum("error" in line for line in device.log) == resets - 1


def test_runner_as_a_library_from_the_zip(bundles: Bundles, on_pynq: Board) -> None:
    net, path = bundles["pynq"]
    x = net.feed()
    np.save(on_pynq.folder / "x.npy", x)
    (on_pynq.folder / "vta.hwh").write_text("<hwh/>")
    text = (
        "import numpy as np, json; from runner import Runner\n"
        f"runner = Runner({str(path)!r}, bitstream='vta.bit', compiled=False)\n"
        "y = runner(x=np.load('x.npy'))\n"
        "np.savez('y.npz', **y); print([name for name, ms in runner.times])"
    )
    result = on_pynq.script(text)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['device', 'copy', 'lpsn.requantize', 'device', 'copy']"
    np.testing.assert_array_equal(np.load(on_pynq.folder / "y.npz")["first"], net.evaluate(x)["d"])
    assert on_pynq.log[0] == "overlay"


@pytest.mark.parametrize("python", [pytest.param(os.environ.get("LPSN_BOARD_PYTHON", ""), id="LPSN_BOARD_PYTHON")])
def test_old_python(python: str, on_pynq: Board) -> None:
    """With the interpreter that LPSN_BOARD_PYTHON names (3.8 with numpy, say)."""
    if not python:
        pytest.skip("LPSN_BOARD_PYTHON names no interpreter with numpy")
    for compiled in (True, False):
        result = on_pynq.run("--self-test", python=python, compiled=compiled)
        assert result.returncode == 0, result.stderr


MODELS = Path(__file__).resolve().parents[3] / "tutorials" / "models"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [("espcn_x2", (1, 1, 24, 24)), ("fashion_resnet14", (1, 1, 28, 28)), ("fashion_mobilenet", (1, 1, 28, 28))],
)
def test_real_networks_equal_the_module(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    import lpsn_tvm

    rng = np.random.default_rng(0)
    samples = rng.random((16, *shape[1:]), dtype=np.float32)
    options = {"calibration": samples, "bits": 8, "measure": False, "progress": False, "sparsity": None}
    source = MODELS / f"{name}.onnx"
    shapes = {"input": shape} if name == "espcn_x2" else {}
    module = lpsn_tvm.build(source, target="vta -preset=pynq", input_shapes=shapes, **options)
    x = samples[:2]
    module.export_pynq(tmp_path / "b.zip", sample={module.inputs[0].name: x[: module.batch]})
    device = board(tmp_path / "b.zip", tmp_path, PRESETS["pynq"])
    np.save(tmp_path / "x.npy", x)
    result = device.run("--self-test", "--input", "x.npy", "--output", "y.npy", compiled=True)
    assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), module(x))


# --- the bitstream


@pytest.mark.parametrize(("bundle", "bitstream"), [("pynq", "pynq-0.0.2"), ("pynq-0.0.2", "pynq")])
def test_wrong_instruction_set_is_named(bundle: str, bitstream: str, bundles: Bundles, tmp_path: Path) -> None:
    """... and nothing is stored before it is known: the only program that fails is the probe."""
    device = board(bundles[bundle][1], tmp_path, PRESETS[bitstream])
    message = _message(device.run("--self-test"))
    assert f"speaks instruction set {PRESETS[bitstream].isa_version}" in message
    assert f"compiled for {PRESETS[bundle].isa_version}" in message
    assert f'target="vta -preset={bitstream}"' in message
    errors = [line for line in device.log if "error" in line]
    assert len(errors) == (1 if bitstream == "pynq-0.0.2" else 0)
    assert all("instruction 0" in line and "memory id 6" in line for line in errors)


def test_wrong_instruction_set_without_a_preset(bundles: Bundles, tmp_path: Path) -> None:
    device = board(bundles["pynq-i4"][1], tmp_path, replace(PRESETS["pynq-i4"], isa_version="0.0.2"))
    assert '"isa_version": "0.0.2" in that file, or load' in _message(device.run())


def test_wrong_geometry(bundles: Bundles, tmp_path: Path) -> None:
    message = _message(board(bundles["pynq"][1], tmp_path, PRESETS["pynq-4x8"]).run("--timeout", "0.2"))
    assert "self-test failed" in message
    assert "1x16_i8w8a32_15_15_18_17" in message


def test_board_that_never_finishes(bundles: Bundles, tmp_path: Path) -> None:
    device = board(bundles["pynq"][1], tmp_path, PRESETS["pynq"], never_finishes=True)
    message = _message(device.run("--timeout", "0.2"))
    assert "did not finish within 0.2 s" in message
    assert "0x43c02018 (compute, done) never became 1" in message


def test_bitstream_files(on_pynq: Board) -> None:
    folder = on_pynq.folder
    (folder / "vta.bit").rename(folder / "other.bit")
    assert "does not exist" in _message(on_pynq.run())
    (folder / "vta.bit").write_text("<html>")
    assert "is not a bitstream" in _message(on_pynq.run())
    (folder / "vta.bit").write_bytes((folder / "other.bit").read_bytes().replace(b"7z020clg484", b"xczu3eg-sbv"))
    assert "is for the chip" in _message(on_pynq.run())


# --- the machine


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"root": False}, "by root only"),
        ({"memory": 100_000}, "could not be allocated"),
        ({"clock": 200.0}, "clock FCLK0 is 200"),
    ],
)
def test_machine(options: dict[str, Any], expected: str, bundles: Bundles, tmp_path: Path) -> None:
    device = board(bundles["pynq"][1], tmp_path, PRESETS["pynq"], **options)
    assert expected in _message(device.run())


def test_pynq_missing(on_pynq: Board) -> None:
    on_pynq.options = None
    assert "the module pynq cannot be imported" in _message(on_pynq.run())


def test_inputs(on_pynq: Board) -> None:
    np.save(on_pynq.folder / "x.npy", np.zeros((1, 3, 5, 6), np.int8))
    message = _message(on_pynq.run("--input", "x.npy"))
    assert "input 'x' must be numbers of shape ['N', 20, 5, 6], got int8[1, 3, 5, 6]" in message
    assert "cannot be read as .npy" in _message(on_pynq.run("--input", "nothing.npy"))


# --- the bundle


def test_damaged_bundle(on_pynq: Board) -> None:
    weight = on_pynq.bundle / "program0" / "weight.bin"
    data = weight.read_bytes()
    weight.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert "program0/weight.bin was damaged" in _message(on_pynq.run())
    weight.unlink()
    assert "lacks program0/weight.bin" in _message(on_pynq.run())
    on_pynq.tamper("network.json", "{", "{")
    manifest = on_pynq.bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    assert "has format 2" in _message(on_pynq.run())


def test_wrong_results_of_the_network_are_noticed(on_pynq: Board) -> None:
    on_pynq.tamper("network.json", '"multiplier": 2.0', '"multiplier": 4.0')
    message = _message(on_pynq.run("--self-test"))
    assert "output 'first' differs from the exported one" in message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("        self.buffer.flush()\n", "        pass\n"),
        ("        self.buffer.invalidate()\n", "        pass\n"),
        ("        self._clear_done()\n", "        pass\n"),
        ('"load": (0x10, 0x18)', '"load": (0x10,)'),
    ],
    ids=["flush", "invalidate", "stale done", "base register"],
)
def test_planted_bugs_of_the_runner_are_noticed(old: str, new: str, on_pynq: Board) -> None:
    on_pynq.tamper("pynq_board.py", old, new)
    assert "self-test failed" in _message(on_pynq.run("--self-test", "--timeout", "0.2"))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "self.pynq.Bitstream(self.bitstream)",
            "self.pynq.Overlay(self.bitstream)",
            "could not be loaded: Cannot find HWH",
        ),
        (
            "                self._loaded.download()\n        except",
            "                pass\n        except",
            "could not",
        ),
    ],
    ids=["overlay without metadata", "nothing downloaded"],
)
def test_planted_bugs_of_the_start(old: str, new: str, expected: str, on_pynq: Board) -> None:
    """What the fake board refuses as a real one does."""
    on_pynq.tamper("pynq_board.py", old, new)
    result = on_pynq.run()
    assert result.returncode != 0
    assert expected in result.stderr or "no bitstream is loaded" in result.stderr


def test_same_network_gives_the_same_file(bundles: Bundles, tmp_path: Path) -> None:
    net = split(PRESETS["pynq"])
    sample = {"x": net.feed()}
    names = ["first", "second"]
    again = export_pynq(assembled(net.lowered("d", "c")), tmp_path / "b.zip", sample=sample, output_names=names)
    assert again.read_bytes() == bundles["pynq"][1].read_bytes()
    with zipfile.ZipFile(again) as archive:
        manifest = json.loads(archive.read("manifest.json"))
        assert set(archive.namelist()) == {*manifest["sha256"], "manifest.json"}
        assert VtaConfig.from_json(json.loads(archive.read("vta_config.json"))) == PRESETS["pynq"]
        assert "$" not in archive.read("README.md").decode()


def test_board_files_are_python_3_8() -> None:
    """Syntax only; LPSN_BOARD_PYTHON runs them."""
    for name in BOARD_FILES:
        if name.endswith(".py"):
            ast.parse((Path(runner.__file__).parent / name).read_text(), feature_version=(3, 8))


def test_what_was_compiled_is_kept(on_pynq: Board) -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler on this machine")
    for file in on_pynq.bundle.glob("host_ops-*.so"):
        file.write_bytes(b"for another machine")
    text = "from host_library import open_library\nprint(open_library({!r}) is not None)"
    for _ in range(2):
        assert on_pynq.script(text.format(str(on_pynq.bundle))).stdout == "True\n"
        built = [file for file in on_pynq.bundle.glob("host_ops-*-*.so")]
        assert len(built) == 1
        assert built[0].stat().st_size > 10_000


def test_sample_of_another_batch_size(tmp_path: Path) -> None:
    net = split(PRESETS["pynq"])
    x = np.concatenate([net.feed(), net.feed()])
    assert run_bundle(export_pynq(assembled(net.lowered("d")), tmp_path / "b.zip", sample=x)).outputs["d"].shape[0] == 1


def test_export_errors(tmp_path: Path) -> None:
    net = split(PRESETS["pynq"])
    network = assembled(net.lowered("d"))
    with pytest.raises(ArtifactError, match="input 'x': the sample must have shape"):
        export_pynq(network, tmp_path / "b.zip", sample={"x": np.zeros((1, 2))})
    with pytest.raises(ArtifactError, match="cannot be written"):
        export_pynq(network, tmp_path / "missing" / "b.zip")
    assert not list(tmp_path.iterdir())
