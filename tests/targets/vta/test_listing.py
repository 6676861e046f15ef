"""`lpsn-tvm vta disasm` on everything that holds a program."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner
from vta_networks import two_convolutions

from lpsn_tvm.cli import app
from lpsn_tvm.errors import ArtifactError
from lpsn_tvm.targets.vta.config import PRESETS
from lpsn_tvm.targets.vta.export import export_network, program_folders
from lpsn_tvm.targets.vta.isa import assemble, assemble_program, decode
from lpsn_tvm.targets.vta.listing import read_listings
from lpsn_tvm.targets.vta.serialize import network_to_files

CONFIG = PRESETS["pynq-0.0.2"]
runner = CliRunner()


@pytest.fixture(scope="module")
def network() -> object:
    return two_convolutions(CONFIG, split=True)


@pytest.fixture
def exported(tmp_path: Path, network: object) -> Path:
    return export_network(network, tmp_path / "net")  # type: ignore[arg-type]


@pytest.fixture
def bundle(tmp_path: Path, network: object) -> Path:
    """As much of a bundle as holds programs."""
    record, members = network_to_files(network)  # type: ignore[arg-type]
    path = tmp_path / "bundle.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("manifest.json", "{}")
        archive.writestr("network.json", json.dumps(record))
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_directory(exported: Path) -> None:
    result = runner.invoke(app, ["vta", "disasm", str(exported)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    heads = [line for line in lines if line.startswith("# ")]
    assert [head.split(":")[0] for head in heads] == ["# 00_conv1", "# 01_conv2"]
    assert "1x16_i8w8a32_15_15_18_17, isa 0.0.2" in heads[0]
    assert lines[-1].split() == [lines[-1].split()[0], "finish"]
    assert any("store sram=0 addr=0x" in line and "# output+0x0" in line for line in lines)


def test_text_assembles_to_the_same_instructions(exported: Path) -> None:
    for folder, listing in zip(program_folders(exported), read_listings(exported), strict=True):
        text = "\n".join(line.lstrip("0123456789 ") for line in listing.lines())
        again = assemble_program(text, CONFIG)
        assert again == decode((folder / "insn.bin").read_bytes(), CONFIG) == listing.instructions


def test_one_program(exported: Path) -> None:
    folder = program_folders(exported)[0]
    for path in (folder, folder / "program.json"):
        result = runner.invoke(app, ["vta", "disasm", str(path), "--json"])
        assert result.exit_code == 0, result.output
        (program,) = json.loads(result.output)["programs"]
        assert program["name"] == "00_conv1"
        assert program["config"]["isa_version"] == "0.0.2"
        for index, entry in enumerate(program["instructions"]):
            assert entry["index"] == index
            value = assemble(entry["text"], CONFIG)
            assert all(getattr(value, flag) for flag in entry["flags"])
            assert all(getattr(value, name) == field for name, field in entry["fields"].items())
        assert program["instructions"][-1]["kind"] == "finish"


def test_a_broken_program_is_still_shown(exported: Path) -> None:
    folder = program_folders(exported)[0]
    record = json.loads((folder / "program.json").read_text())
    record["regions"]["weight"]["addr"] = 2**31
    (folder / "program.json").write_text(json.dumps(record))
    result = runner.invoke(app, ["vta", "disasm", str(folder)])
    assert result.exit_code == 0
    assert "# outside of all regions" in result.output


def test_bundle(bundle: Path, tmp_path: Path) -> None:
    """Zip or unpacked: addresses from the region's start, and operators where they begin."""
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(tmp_path / "unpacked")
    outputs = [runner.invoke(app, ["vta", "disasm", str(path)]).output for path in (bundle, tmp_path / "unpacked")]
    assert outputs[0] == outputs[1]
    assert "# conv1" in outputs[0] and "# program3" in outputs[0]
    stores = [line for line in outputs[0].splitlines() if " store " in line]
    assert stores and "addr=0x0 " in stores[0] and all(line.endswith("# output") for line in stores)


def test_saved_module(tmp_path: Path, network: object) -> None:
    record, members = network_to_files(network)  # type: ignore[arg-type]
    with zipfile.ZipFile(tmp_path / "net.lpsn", "w") as archive:
        archive.writestr("manifest.json", json.dumps({"kind": "vta", "network": record}))
        for name, data in members.items():
            archive.writestr(name, data)
    assert [listing.name for listing in read_listings(tmp_path / "net.lpsn")] == ["program1", "program3"]


def test_bare_instructions(exported: Path, tmp_path: Path) -> None:
    insn = program_folders(exported)[0] / "insn.bin"
    CONFIG.write(tmp_path / "vta_config.json")
    texts = [
        runner.invoke(app, ["vta", "disasm", str(insn), "--config", config]).output
        for config in ("pynq-0.0.2", str(tmp_path / "vta_config.json"))
    ]
    assert texts[0] == texts[1]
    assert texts[0].splitlines()[-1].endswith("finish")


def test_bad_input(exported: Path, bundle: Path, tmp_path: Path) -> None:
    insn = program_folders(exported)[0] / "insn.bin"
    (tmp_path / "empty").mkdir()
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.jpg", b"")
    damaged = bytearray(bundle.read_bytes())
    damaged[60:200] = bytes(140)
    (tmp_path / "damaged.zip").write_bytes(damaged)
    cases = [
        ([str(insn)], "bare instructions need --config"),
        ([str(insn), "--config", "zynq"], "unknown VTA configuration 'zynq'"),
        ([str(insn), "--config", str(tmp_path / "none.json")], "cannot be read as JSON"),
        ([str(tmp_path / "none")], "does not exist"),
        ([str(tmp_path / "empty")], "has no program.json and no network.json"),
        ([str(tmp_path / "photos.zip")], "is neither a bundle nor a VTA module"),
        ([str(tmp_path / "damaged.zip")], "damaged.zip: "),
    ]
    for arguments, message in cases:
        result = runner.invoke(app, ["vta", "disasm", *arguments])
        assert result.exit_code == 2, (arguments, result.output)
        assert message in result.output.replace("\n", " "), (arguments, result.output)
        as_json = runner.invoke(app, ["vta", "disasm", *arguments, "--json"])
        assert set(json.loads(as_json.output)) == {"error", "message"}


@pytest.mark.parametrize("change", ["insn", "targets", "regions", "config", "steps"])
def test_damaged_bundles(change: str, network: object, tmp_path: Path) -> None:
    record, members = network_to_files(network)  # type: ignore[arg-type]
    step = next(step for step in record["steps"] if step["kind"] == "device")
    if change in step:
        step[change] = [] if change == "regions" else "../../../etc/passwd"
    else:
        record[change] = 7
    folder = tmp_path / "unpacked"
    for name, data in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    (folder / "manifest.json").write_text("{}")
    (folder / "network.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError):
        read_listings(folder)
