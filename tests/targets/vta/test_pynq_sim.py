"""`lpsn-tvm vta run bundle.zip --sim`: a bundle on any machine."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner
from vta_nets import Pointwise, assembled, split

from lpsn_tvm.cli_vta import app
from lpsn_tvm.errors import ArtifactError
from lpsn_tvm.targets.vta import pynq
from lpsn_tvm.targets.vta.board.bundle import relocated
from lpsn_tvm.targets.vta.config import PRESETS
from lpsn_tvm.targets.vta.execute import execute
from lpsn_tvm.targets.vta.network import VtaNetwork
from lpsn_tvm.targets.vta.program import PAGE, link
from lpsn_tvm.targets.vta.serialize import program_to_files
from lpsn_tvm.targets.vta.simulated_board import run_bundle


@pytest.fixture(scope="module")
def net() -> Pointwise:
    return split(PRESETS["pynq-0.0.2"])


@pytest.fixture(scope="module")
def network(net: Pointwise) -> VtaNetwork:
    return assembled(net.lowered("d", "c"))


@pytest.fixture(scope="module")
def bundle(network: VtaNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "bundle.zip"
    with pytest.MonkeyPatch.context() as patch:  # cross compilers are another test's business
        patch.setattr(pynq, "CROSS_COMPILERS", {})
        feed = np.arange(20 * 30).reshape(1, 20, 5, 6) % 200 - 100
        return pynq.export_pynq(network, path, sample={"x": feed}, output_names=["first", "second"])


def test_sample_is_the_default_input(bundle: Path) -> None:
    run = run_bundle(bundle)
    assert [line[:3] for line in run.self_test] == ["ok:"] * 3
    assert "instruction set 0.0.2" in run.self_test[0]
    assert {name: v.shape for name, v in run.outputs.items()} == {"first": (1, 33, 5, 6), "second": (1, 16, 5, 6)}


@pytest.mark.parametrize("model", ["rtl", "pynq"])
def test_outputs_and_cycles_are_those_of_the_network(
    bundle: Path, net: Pointwise, network: VtaNetwork, model: str
) -> None:
    x = np.concatenate([net.feed(), net.feed()])
    run = run_bundle(bundle, x, model=model)
    assert run.self_test == ()
    for index in range(2):
        np.testing.assert_array_equal(run.outputs["first"][index : index + 1], net.evaluate(x[index : index + 1])["d"])
    expected = [result.cycles for result in execute(network, {"x": x[:1]}, model=model).simulations]
    # Addresses decide which bursts cross a 2 KiB boundary, nothing more.
    np.testing.assert_allclose(run.cycles, expected * 2, rtol=0.02)
    assert run.milliseconds == pytest.approx(sum(run.cycles) / 1e5)


def test_command(bundle: Path, net: Pointwise, tmp_path: Path) -> None:
    x = net.feed()
    np.savez(tmp_path / "x.npz", x=x)
    arguments = ["run", str(bundle), "--sim", "--input", str(tmp_path / "x.npz"), "--output", str(tmp_path / "y.npz")]
    result = CliRunner().invoke(app, [*arguments, "--json", "--model", "rtl"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["cycles"] == sum(record["programs"]) > 0
    assert record["configuration"] == "1x16_i8w8a32_15_15_18_17"
    assert record["outputs"]["first"]["shape"] == [1, 33, 5, 6]
    np.testing.assert_array_equal(np.load(tmp_path / "y.npz")["first"], net.evaluate(x)["d"])
    text = CliRunner().invoke(app, ["run", str(bundle), "--sim"]).stdout
    assert "ok: the network gives the 2 output(s)" in text
    assert "cycles in 2 program runs" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.zip", "--sim"], "is not a readable bundle"),
        ([".", "--sim"], "manifest.json is missing"),
        (["no.zip"], "this machine is no board"),
        (["BUNDLE", "--sim", "--model", "other"], "unknown cycle model"),
        (["BUNDLE", "--sim", "--input", "no.npy"], "cannot be read as .npy"),
    ],
)
def test_command_errors(
    arguments: list[str], message: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [str(bundle) if a == "BUNDLE" else a for a in arguments]
    result = CliRunner().invoke(app, ["run", *arguments, "--json"])
    assert result.exit_code == 2
    assert message in json.loads(result.stdout)["message"]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_relocation_equals_the_linker(name: str) -> None:
    """The board's relocation of encoded instructions is what `link` does before it encodes them."""
    network, rng = assembled(split(PRESETS[name]).lowered("d", "c")), np.random.default_rng(1)
    for step in network.device_steps:
        blobs: dict[str, bytes] = {}
        record = program_to_files(step.program, "p", blobs)
        places = {
            region["name"]: int(page) * PAGE
            for region, page in zip(record["regions"], rng.integers(1, 1 << 19, 99), strict=False)
        }
        linked = link(step.program, {**places, "insn": PAGE})
        config = step.program.config.to_json()
        assert relocated(blobs[record["insn"]], blobs[record["targets"]], list(places.values()), config) == linked.insn


def test_damage_anywhere_is_noticed(bundle: Path, tmp_path: Path) -> None:
    """Bytes are flipped and the end is cut off: one kind of error, never a traceback or wrong data (some bits of a
    compressed stream mean nothing).
    """
    data, rng, right = bundle.read_bytes(), np.random.default_rng(0), run_bundle(bundle).outputs["first"]
    noticed = 0
    with zipfile.ZipFile(bundle) as archive:
        starts = [info.header_offset + 30 + len(info.filename) for info in archive.infolist()]
    damaged = tmp_path / "damaged.zip"
    for position in [*rng.choice(starts, 10, replace=False).tolist(), *rng.integers(0, len(data), 10).tolist()]:
        damaged.write_bytes(data[:position] + bytes([data[position] ^ 0x41]) + data[position + 1 :])
        try:
            np.testing.assert_array_equal(run_bundle(damaged).outputs["first"], right)
        except ArtifactError:
            noticed += 1
    assert noticed > 10
    damaged.write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match="not a readable bundle"):
        run_bundle(damaged)
