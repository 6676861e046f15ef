"""Program directories and exported networks: what is written runs, what is damaged is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vta_networks import two_convolutions

from lpsn_tvm.errors import ArtifactError, CompileError
from lpsn_tvm.targets.vta.config import PRESETS
from lpsn_tvm.targets.vta.execute import execute
from lpsn_tvm.targets.vta.export import export_network, export_program, program_folders, read_program
from lpsn_tvm.targets.vta.isa import Finish, Load, Store, decode
from lpsn_tvm.targets.vta.program import LinkedProgram, Program, Region, link
from lpsn_tvm.targets.vta.simulator import simulate

CONFIG = PRESETS["pynq"]
KEYS = {
    "LOG_INP_WIDTH", "LOG_WGT_WIDTH", "LOG_ACC_WIDTH", "LOG_OUT_WIDTH", "LOG_BATCH", "LOG_BLOCK_IN", "LOG_BLOCK_OUT",
    "LOG_UOP_BUFF_SIZE", "LOG_INP_BUFF_SIZE", "LOG_WGT_BUFF_SIZE", "LOG_ACC_BUFF_SIZE", "LOG_BUS_WIDTH", "isa_version",
}  # fmt: skip


def copy_program(config: Any = CONFIG, *, tiles: int = 4) -> LinkedProgram:
    """Not a useful program, but one that obeys the memory map: loads, stores, reads back."""
    instructions = [
        Load(memory="inp", y_size=2, x_size=tiles // 2, x_stride=tiles // 2),
        Store(y_size=1, x_size=tiles, x_stride=tiles),
        Load(memory="inp", y_size=2, x_size=1, x_stride=tiles - 1),
        Load(memory="uop"),
        Finish(),
    ]
    size = tiles * config.inp_tile_bytes
    regions = {"in put": Region("in put", size), "output": Region("output", size, access="rw")}
    return link(Program(config, instructions, ["in put", "output", "output", None, None], regions))


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    linked = copy_program()
    return export_program(
        linked,
        tmp_path / "program",
        {"output": bytes(64)},
        {"rtl": 12, "pynq": 34},
        inputs={"in put": bytes(range(64))},
    )


@pytest.mark.parametrize("key", PRESETS)
def test_round_trip(key: str, tmp_path: Path) -> None:
    config = PRESETS[key]
    linked = copy_program(config)
    size = linked.regions["output"].size
    inputs, expected = {"in put": bytes(range(size))}, {"output": bytes(size)}
    path = export_program(linked, tmp_path / "p", expected, {"rtl": 12}, inputs=inputs)
    for where in (path, path / "program.json"):
        back, outputs, cycles = read_program(where)
        assert (back.config, back.insn, back.insn_addr) == (config, linked.insn, linked.insn_addr)
        assert {name: (r.addr, r.size, r.access) for name, r in back.regions.items()} == {
            name: (r.addr, r.size, r.access) for name, r in linked.regions.items()
        }
        assert back.regions["in put"].data == inputs["in put"] and back.regions["output"].data is None
        assert outputs == expected and cycles == {"rtl": 12}


def test_program_json_has_the_documented_keys(exported: Path) -> None:
    record = json.loads((exported / "program.json").read_text())
    assert set(record) == {"config", "insn_addr", "insn_count", "regions", "expected", "cycles"}
    assert set(record["config"]) == KEYS
    assert record["insn_count"] == 5
    assert record["regions"]["insn"] == {"addr": record["insn_addr"], "size": 80, "file": "insn.bin", "access": "r"}
    assert record["insn_addr"] % 4096 == 0
    assert set(record["regions"]["output"]) == {"addr", "size", "access"}
    assert record["expected"] == {"output": "expected_output.bin"}
    files = {"program.json", "vta_config.json", "insn.bin", "expected_output.bin", record["regions"]["in put"]["file"]}
    assert set(os.listdir(exported)) == files


def test_another_configuration_file_is_optional(exported: Path) -> None:
    (exported / "vta_config.json").unlink()
    assert read_program(exported)[0].config == CONFIG


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    linked = copy_program()
    with pytest.raises(ArtifactError, match="expected output 'output': 3 bytes, the region has 64"):
        export_program(linked, tmp_path / "p", {"output": b"abc"}, inputs={"in put": bytes(64)})
    with pytest.raises(ArtifactError, match="region 'in put': is read-only"):
        export_program(linked, tmp_path / "p", {"in put": bytes(64)}, inputs={"in put": bytes(64)})
    with pytest.raises(ArtifactError, match="no region 'x'; there are in put, output"):
        export_program(linked, tmp_path / "p", inputs={"x": bytes(64)})
    with pytest.raises(CompileError, match="instruction 0: reads bytes of region 'in put' that nothing has written"):
        export_program(linked, tmp_path / "p")
    assert os.listdir(tmp_path) == []


def test_an_earlier_export_is_replaced_and_nothing_else(exported: Path, tmp_path: Path) -> None:
    linked = copy_program(tiles=8)
    data = {"in put": bytes(128)}
    export_program(linked, exported, inputs=data)
    assert read_program(exported)[0].regions["output"].size == 128
    assert not (exported / "expected_output.bin").exists()
    assert os.listdir(tmp_path) == ["program"]
    (exported / "thesis.tex").write_text("three years")
    with pytest.raises(ArtifactError, match=r"holds other files \(thesis.tex\); give a new or empty folder"):
        export_program(linked, exported, inputs=data)
    assert (exported / "thesis.tex").read_text() == "three years"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "weights.bin").write_bytes(b"mine")
    with pytest.raises(ArtifactError, match="holds other files"):
        export_program(linked, tmp_path / "data", inputs=data)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="exists and is not a folder"):
        export_program(linked, tmp_path / "file", inputs=data)
    with pytest.raises(ArtifactError, match="cannot be written"):
        export_program(linked, tmp_path / "no" / "such" / "folder", inputs=data)
    (tmp_path / "empty").mkdir()
    export_program(linked, tmp_path / "empty", inputs=data)


def _set(*keys: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = to

    return change


def _remove(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        for key in keys[:-1]:
            record = record[key]
        del record[keys[-1]]

    return change


DAMAGE: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (_remove("regions"), "missing regions"),
    (_remove("insn_count"), "missing insn_count"),
    (_set("extra", to=1), "unknown 'extra'"),
    (_set("config", to=[]), "config: expected a JSON object"),
    (_set("config", "LOG_BATCH", to=9), "rule 'range': LOG_BATCH"),
    (_set("config", "isa_version", to="0.0.2"), "contradicts vta_config.json"),
    (_remove("config", "LOG_ACC_WIDTH"), "missing LOG_ACC_WIDTH"),
    (_set("insn_count", to=4), "insn_count = 4 instructions"),
    (_set("insn_count", to="5"), "insn_count must be an integer from 0"),
    (_set("insn_addr", to=-1), "insn_addr must be an integer from 0"),
    (_set("insn_addr", to=8192), "must have a file and be insn_count"),
    (_remove("regions", "insn"), "region 'insn' must have a file"),
    (_set("regions", to=[]), "regions must be an object"),
    (_set("regions", "output", to=7), "regions.output: expected an object, got 7"),
    (_set("regions", "output", "access", to="x"), r"regions.output: access must be"),
    (_set("regions", "output", "access", to=["r"]), r"regions.output: access must be"),
    (_set("regions", "output", "access", to="w"), "region 'output' has access 'w': it cannot be read"),
    (_set("regions", "output", "access", to="r"), "region 'output' has access 'r': it cannot be written"),
    (_set("regions", "output", "speed", to=3), "regions.output: unknown 'speed'"),
    (_set("regions", "output", "size", to=True), "regions.output: size must be an integer"),
    (_set("regions", "output", "size", to=1.5), "regions.output: size must be an integer"),
    (_set("regions", "output", "size", to=2**40), "size must be an integer from 0 to 2"),
    (_set("regions", "output", "size", to=2**32), "not below 2"),
    (_set("regions", "output", "size", to=48), "row 0 at 0x102000 of 64 bytes is not inside one region"),
    (_set("regions", "output", "addr", to=0x102008), "not inside one region"),
    (_set("regions", "output", "addr", to=0x101020), "overlaps region"),
    (_set("regions", "other", to={"addr": 0x101010, "size": 4, "access": "r"}), "'in put'.*overlaps region 'other'"),
    (_set("regions", "in put", "size", to=63), r"regions.in put: size is 63, but region-1.bin has 64 bytes"),
    (_remove("regions", "in put", "file"), "reads bytes of region 'in put' that nothing has written"),
    (_set("regions", "in put", "file", to="../../secret.bin"), "regions.in put.file: expected the name of a file"),
    (_set("regions", "in put", "file", to="/etc/passwd"), "expected the name of a file"),
    (_set("regions", "in put", "file", to="gone.bin"), "'gone.bin' cannot be read: No such file"),
    (_set("regions", "in put", "file", to="."), "expected the name of a file"),
    (_set("regions", "in put", "file", to="a\0b"), "expected the name of a file"),
    (_set("regions", "in put", "file", to=3), "expected the name of a file"),
    (_set("regions", "in put", "file", to="link.bin"), "'link.bin' is not a file inside the directory"),
    (_set("expected", "output", to="insn.bin"), "expected output 'output': 80 bytes, the region has 64"),
    (_set("expected", "nowhere", to="insn.bin"), "no region 'nowhere'"),
    (_set("expected", to=3), "expected must be an object"),
    (_set("cycles", "rtl", to="many"), "cycles: rtl must be an integer"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGE, ids=[message for _, message in DAMAGE])
def test_damaged_json(change: Callable[[dict[str, Any]], None], message: str, exported: Path) -> None:
    path = exported / "program.json"
    (exported.parent / "secret.bin").write_bytes(bytes(64))
    (exported / "link.bin").symlink_to(exported.parent / "secret.bin")
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=message) as caught:
        read_program(exported)
    assert "program.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "nonsense", "[" * 100_000, "\x00"])
def test_what_is_no_json_object(text: str, exported: Path) -> None:
    (exported / "program.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"program\.json: "):
        read_program(exported)


def test_damaged_instructions(exported: Path) -> None:
    (exported / "insn.bin").write_bytes(b"\xff" * 80)
    with pytest.raises(ArtifactError, match=r"program.json: instruction 0: opcode 7 is unknown"):
        read_program(exported)
    (exported / "insn.bin").unlink()
    with pytest.raises(ArtifactError, match=r"regions\.insn\.file: 'insn.bin' cannot be read"):
        read_program(exported)
    shutil.rmtree(exported)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_program(exported)


@pytest.mark.parametrize("key", PRESETS)
@pytest.mark.parametrize("per_layer", [False, True], ids=["whole", "per_layer"])
def test_exported_networks_run(key: str, per_layer: bool, tmp_path: Path) -> None:
    """Every program, read back, leaves the expected bytes in the predicted cycles, whatever the interleaving."""
    network = two_convolutions(PRESETS[key])
    path = export_network(network, tmp_path / "net", per_layer)
    folders = program_folders(path)
    assert [folder.name for folder in folders] == (["00_conv1", "01_conv2"] if per_layer else ["00_conv1"])
    for folder in folders:
        linked, expected, cycles = read_program(folder)
        assert expected and set(cycles) == {"rtl", "pynq"}
        for interleaving in (None, 1):
            result = simulate(linked, interleaving=interleaving)
            assert {name: result.memory[name] for name in expected} == expected
        assert simulate(linked, model="rtl").cycles == cycles["rtl"] < cycles["pynq"]
        for data in expected.values():
            assert any(data)


def test_network_json(tmp_path: Path) -> None:
    network = two_convolutions(CONFIG, split=True)
    feeds = {"data": np.random.default_rng(1).standard_normal((1, 16, 5, 5)).astype(np.float32)}
    path = export_network(network, tmp_path / "net", feeds=feeds)
    record = json.loads((path / "network.json").read_text())
    kinds = [step["kind"] for step in record["steps"]]
    assert kinds == ["host", "program", "host", "program", "host"]
    assert [s["directory"] for s in record["steps"] if s["kind"] == "program"] == ["00_conv1", "01_conv2"]
    tensor = record["steps"][1]["inputs"][0]
    assert (tensor["name"], tensor["value"], tensor["shape"], tensor["scale"]) == ("first", "q", [1, 16, 5, 5], 0.25)
    assert record["steps"][3]["outputs"][0]["scale"] == 0.5
    assert record["steps"][0]["op"] == "lpsn.quantize" and record["steps"][0]["attrs"]["inv_scale"] == 4.0
    np.testing.assert_array_equal(np.load(path / record["inputs"][0]["file"]), feeds["data"])
    expected = execute(network, feeds, model=None).outputs["y"]
    np.testing.assert_array_equal(np.load(path / record["outputs"][0]["file"]), expected)
    export_network(network, path)
    with pytest.raises(ArtifactError, match=r"feeds: expected inputs \['data'\], got \['x'\]"):
        export_network(network, path, feeds={"x": feeds["data"]})
    with pytest.raises(ArtifactError, match=r"input 'data': shape \(1, 3\) is not"):
        export_network(network, path, feeds={"data": np.zeros((1, 3))})


def test_layers_have_only_what_they_need(tmp_path: Path) -> None:
    network = two_convolutions(CONFIG)
    whole = read_program(program_folders(export_network(network, tmp_path / "whole"))[0])[0]
    layers = [read_program(f)[0] for f in program_folders(export_network(network, tmp_path / "layers", True))]
    assert "arena" in whole.regions and all("arena" not in layer.regions for layer in layers)
    assert sum(layer.regions["weight"].size for layer in layers) == whole.regions["weight"].size
    assert layers[0].regions["output"].size == layers[1].regions["input"].size == 2 * 25 * 16
    windows = json.loads((tmp_path / "layers" / "network.json").read_text())["steps"][2]["windows"]
    assert {"region": "weight", "of": "weight", "offset": 512, "size": 512} in windows


def test_expected_outputs_do_not_come_from_the_instructions(tmp_path: Path) -> None:
    """A wrong instruction shows."""
    path = export_network(two_convolutions(CONFIG), tmp_path / "net")
    folder = program_folders(path)[0]
    insn = bytearray((folder / "insn.bin").read_bytes())
    linked, expected, _ = read_program(folder)
    alu = next(i for i, op in enumerate(decode(linked.insn, CONFIG)) if getattr(op, "op", "") == "shr")
    insn[16 * alu + 14] ^= 1 << 1  # the shift amount: bits 47.. of word 1
    (folder / "insn.bin").write_bytes(insn)
    result = simulate(read_program(folder)[0], strict=False)
    assert result.memory["output"] != expected["output"]


def test_network_folder_names_stay_inside(tmp_path: Path) -> None:
    path = export_network(two_convolutions(CONFIG), tmp_path / "net")
    record = json.loads((path / "network.json").read_text())
    for name in ("../00_conv1", "/tmp", "..", 3, None):
        record["steps"][1]["directory"] = name
        (path / "network.json").write_text(json.dumps(record))
        with pytest.raises(ArtifactError, match="directory must be a numbered name"):
            program_folders(path)
    (path / "network.json").write_text('{"steps": 3}')
    with pytest.raises(ArtifactError, match="steps must be a list"):
        program_folders(path)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4], ids=["8", "4"])
def test_a_built_network_layer_by_layer(bits: int, tmp_path: Path) -> None:
    """Residual sums, strides, pooling and the head, each alone."""
    import lpsn_tvm

    model = Path(__file__).resolve().parents[3] / "tutorials" / "models" / "fashion_resnet14.onnx"
    with pytest.warns(UserWarning, match="no calibration data"):
        module = lpsn_tvm.build(model, target="vta", bits=bits, sparsity=None, search=False, progress=False)
    path = module.export_vta(tmp_path / "net", per_layer=True)  # type: ignore[attr-defined]
    folders = program_folders(path)
    assert len(folders) > 10
    for folder in folders:
        linked, expected, cycles = read_program(folder)
        result = simulate(linked, interleaving=2)
        assert {name: result.memory[name] for name in expected} == expected, folder.name
        assert simulate(linked, model="pynq", functional=False).cycles == cycles["pynq"]
