"""`build(target="vta")` from ONNX to simulated outputs: bit for bit what the integer graph says, or a clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_graphs import random_model
from vta_whole import assert_whole_network_is_exact, build_with_graph

import lpsn_tvm
from lpsn_tvm import ArtifactError, CompileError, Recipe, RecipeError, TargetError
from lpsn_tvm.artifact import TensorInfo
from lpsn_tvm.schedules.vta.ops import Gemm, Plane, Scalar, Span, Store, Tap, TileOp
from lpsn_tvm.targets import get_backend
from lpsn_tvm.targets.vta.artifact import VtaArtifact
from lpsn_tvm.targets.vta.backend import compile_network
from lpsn_tvm.targets.vta.config import PRESETS
from lpsn_tvm.targets.vta.layout import TileLayout
from lpsn_tvm.targets.vta.network import LoweredNetwork, SymbolicTensor

MODELS = Path(__file__).resolve().parents[3] / "tutorials" / "models"
pytestmark = pytest.mark.filterwarnings("ignore:no calibration data")


def assert_equals_reference(module: VtaArtifact, mod: Any, seed: int = 0) -> None:
    assert_whole_network_is_exact(module, mod, seed=seed, interleavings=0)


@pytest.mark.parametrize("bits", [8, 4, (4, 8)], ids=str)
@pytest.mark.parametrize("seed", [2, 3, 7, 12])
def test_random_networks_equal_the_integer_graph(seed: int, bits: Any) -> None:
    assert_equals_reference(*build_with_graph(random_model(seed), bits=bits))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["vta", "vta -preset=pynq-0.0.2", "vta -preset=pynq-4x8", "vta -preset=pynq-i4"])
@pytest.mark.parametrize("seed", range(100, 140))
def test_many_random_networks_equal_the_integer_graph(seed: int, target: str) -> None:
    assert_equals_reference(*build_with_graph(random_model(seed), bits=4 if "i4" in target else 8, target=target))


@pytest.mark.parametrize("name", ["fashion_resnet14", pytest.param("fashion_mobilenet", marks=pytest.mark.slow)])
@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_shipped_networks_equal_the_integer_graph(name: str, bits: int) -> None:
    module, mod = build_with_graph(MODELS / f"{name}.onnx", bits=bits)
    assert_equals_reference(module, mod)
    for seed in range(2):
        feeds = {i.name: np.ones(i.shape, np.float32) for i in module.inputs}
        run = module.simulate(feeds, model="rtl", interleaving=seed)
        np.testing.assert_array_equal(run.outputs[module.outputs[0].name], module(feeds))
    # All layers in one program: only the image's way in and the scores' way out are on the host.
    assert len(module.network.device_steps) == 1


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_super_resolution_equals_the_integer_graph(bits: int) -> None:
    assert_equals_reference(
        *build_with_graph(MODELS / "espcn_x2.onnx", bits=bits, input_shapes={"input": (1, 1, 32, 40)})
    )


def test_a_batch_in_one_program() -> None:
    module, mod = build_with_graph(MODELS / "fashion_resnet14.onnx", bits=8, batch=2)
    assert module.batch == 2
    assert_equals_reference(module, mod)


def test_the_report_says_what_runs_where_and_how_fast(tmp_path: Path) -> None:
    stages: list[tuple[str, int, int]] = []
    module, _ = build_with_graph(random_model(7), bits=8, measure=True, progress=lambda *event: stages.append(event))
    record = module.report.accelerator
    assert record is not None and record.config == PRESETS["pynq"].name
    assert {step.place for step in record.steps} == {"accelerator", "host"}
    assert all(step.reason for step in record.steps if step.place == "host")
    assert module.report.accelerator.cycles["pynq"] == module.cycles
    total = sum(len(step.ops) for step in module.network.device_steps)
    assert ("emit", total, total) in stages
    assert "vta schedules and programs" in module.report.seconds
    path = module.save(tmp_path / "net.lpsn")
    assert str(lpsn_tvm.load(path).report) == str(module.report)


def test_a_bitstream_that_nobody_publishes_is_noted() -> None:
    module, _ = build_with_graph(random_model(3), bits=4)
    assert any("no published bitstream for 1x16_i4w4a32_15_14_17_17" in note for note in module.report.notes)
    module, _ = build_with_graph(random_model(3), bits=8)
    assert not any("bitstream" in note for note in module.report.notes)


def test_search_is_cached(tmp_path: Path) -> None:
    model = random_model(3)
    first, mod = build_with_graph(model, bits=8, search=0.3, cache=str(tmp_path))
    entries = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert entries
    again, _ = build_with_graph(model, bits=8, search=0.3, cache=str(tmp_path))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == entries
    assert again.cycles == first.cycles <= build_with_graph(model, bits=8)[0].cycles
    assert_equals_reference(first, mod)


def test_a_configuration_file(tmp_path: Path) -> None:
    PRESETS["pynq-0.0.2"].write(tmp_path / "vta_config.json")
    module, mod = build_with_graph(
        random_model(3), bits=8, target=f"vta -config={tmp_path / 'vta_config.json'} -model=rtl"
    )
    assert (module.config, module.model) == (PRESETS["pynq-0.0.2"], "rtl")
    assert_equals_reference(module, mod)


@pytest.mark.parametrize(
    ("target", "bits", "config"),
    [
        ("vta", 8, "pynq"),
        ("vta", 4, "pynq-i4"),
        ("vta", (4, 8), "pynq-i8w4"),
        ("vta -preset=pynq-0.0.2", 8, "pynq-0.0.2"),
        ("vta -preset=ultra96", 5, "ultra96"),
        ("vta -preset=1x16_i4w4a32_15_14_17_17", 3, "pynq-i4"),
    ],
    ids=str,
)
def test_geometry_follows_target_and_bits(target: str, bits: Any, config: str) -> None:
    pair = bits if isinstance(bits, tuple) else (bits, bits)
    backend = get_backend(target).for_bits(pair)
    assert backend.geometry.config == PRESETS[config]
    assert backend.channel_tile == 16
    assert backend.scheme.rounding == "half_up"
    assert get_backend(backend.tvm_target).geometry.config == PRESETS[config]


@pytest.mark.parametrize(
    ("target", "bits", "message"),
    [
        ("vta", None, "integers only|integer arithmetic"),
        ("vta", 6, r"\(8, 8\)"),
        ("vta", (8, 4), r"\(4, 8\)"),
        ("vta -preset=pynq-i4", 8, "holds 2 to 4"),
        ("vta -preset=nonesuch", 8, "presets: pynq"),
        ("vta -model=exact", 8, "rtl, pynq"),
        ("vta -speed=fast", 8, "-preset"),
        ("vta -preset=pynq -config=x.json", 8, "not both"),
        ("vta -config=/nonexistent/vta_config.json", 8, "cannot be read"),
    ],
    ids=str,
)
def test_bad_targets_and_bits(target: str, bits: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        lpsn_tvm.build(random_model(3), target=target, bits=bits)


def test_few_micro_ops(tmp_path: Path) -> None:
    path = tmp_path / "vta_config.json"
    path.write_text(json.dumps(PRESETS["pynq"].to_json() | {"LOG_UOP_BUFF_SIZE": 11}))
    with pytest.raises(TargetError, match="holds 512; schedules need 1024"):
        get_backend(f"vta -config={path}")


def test_impossible_geometry(tmp_path: Path) -> None:
    path = tmp_path / "vta_config.json"
    path.write_text(json.dumps(PRESETS["pynq"].to_json() | {"LOG_ACC_BUFF_SIZE": 20}))
    with pytest.raises(TargetError, match=r"vta_config\.json"):
        lpsn_tvm.build(random_model(3), target=f"vta -config={path}")


@pytest.mark.parametrize("search", [True, False])
def test_a_kernel_larger_than_any_tiling_is_named(search: bool) -> None:
    """1600 weight tiles per output block; the accelerator has 1024, and taps are not split."""
    one = Span(0, 1, 1)
    taps = tuple(Tap(one, one, Span(i // 40, 1, 1), Span(i % 40, 1, 1), i) for i in range(1600))
    gemm = Gemm(Plane.dense("x", 0, 1, 1, 40, 40), taps, "w", 0, 1600, 1600, 1, (0,))
    op = TileOp("giant", 1, 1, 1, 1, (gemm, Scalar("shr", 3), Store(Plane.dense("y", 0, 1, 1, 1, 1))))
    shapes = {"x": (1, 16, 40, 40), "y": (1, 16, 1, 1)}
    tensors = {name: SymbolicTensor(name, TileLayout(shape, 1, 16)) for name, shape in shapes.items()}
    weights = {"w": np.zeros((1600, 16, 16), np.int8)}
    lowered = LoweredNetwork(
        PRESETS["pynq"], (TensorInfo("x", shapes["x"], "int8"),), ("y",), tensors, weights, {}, (op,)
    )
    with pytest.raises(CompileError, match=r"^giant: fits 1x16_\S+ under no schedule: .*WGT"):
        compile_network(lowered, Recipe(search=search, cache=False), "pynq")


@pytest.mark.parametrize("options", [{"search": -1}, {"search": "fast"}, {"cache": 3}], ids=str)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        lpsn_tvm.build(random_model(3), target="vta", **options)


def test_an_interrupted_search_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lpsn_tvm.targets.vta import backend

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(backend, "find_schedules", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lpsn_tvm.build(random_model(3), target="vta", sparsity=None, cache=str(tmp_path)).save(tmp_path / "net.lpsn")
    assert not list(tmp_path.iterdir())


def test_exports_of_a_build_and_of_its_file(tmp_path: Path) -> None:
    module, _ = build_with_graph(random_model(3), bits=8)
    loaded = lpsn_tvm.load(module.save(tmp_path / "net.lpsn"))
    assert isinstance(loaded, VtaArtifact)
    for name, each in (("fresh", module), ("loaded", loaded)):
        folder = each.export_vta(tmp_path / name)
        assert (folder / "network.json").is_file() or (folder / "program.json").is_file()
        assert each.export_vta(tmp_path / f"{name}_layers", per_layer=True).is_dir()
        assert each.export_pynq(tmp_path / f"{name}.zip").stat().st_size > 0
    assert module.to_onnx().graph.node
    with pytest.raises(ArtifactError, match="build"):
        loaded.to_onnx()
    with pytest.raises(ArtifactError, match="cannot be written"):
        module.export_vta(tmp_path / "no" / "such" / "folder")
    with pytest.raises(ArtifactError, match="cannot be written"):
        module.export_pynq(tmp_path / "no" / "such" / "bundle.zip")


def test_command_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from lpsn_tvm.cli import app

    path, data = tmp_path / "net.lpsn", tmp_path / "x.npy"
    np.save(data, np.zeros((2, 1, 28, 28), np.float32))
    model = str(MODELS / "fashion_resnet14.onnx")
    run = CliRunner().invoke
    options = ["--target", "vta", "--search", "off", "--sparsity", "none", "--json"]
    done = run(app, ["build", model, "-o", str(path), *options])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["report"]["accelerator"]["programs"] == 1
    done = run(app, ["run", str(path), str(data)])
    assert done.exit_code == 0 and "float32[2, 10]" in done.output and "simulated" in done.output
    done = run(app, ["inspect", str(path)])
    assert done.exit_code == 0 and "1x16_i8w8a32_15_15_18_17" in done.output
    for wrong in (["--search", "fast"], ["--bits", "6"], ["--target", "vta -preset=nonesuch"]):
        done = run(app, ["build", model, "-o", str(path), "--target", "vta", *wrong])
        assert done.exit_code == 2


def test_an_ignored_layer_runs_on_the_host_in_float() -> None:
    model = random_model(3)
    layer = next(node.name for node in model.graph.node if node.op_type == "Conv")
    whole, _ = build_with_graph(model, bits=8)
    module, mod = build_with_graph(model, bits=8, ignore=[layer])
    assert any(step.op == "lpsn.float_conv2d" for step in module.network.host_steps)
    assert not any(step.op == "lpsn.float_conv2d" for step in whole.network.host_steps)
    assert_equals_reference(module, mod)
