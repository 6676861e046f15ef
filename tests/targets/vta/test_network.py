"""Lowered steps -> programs: phases, regions, memory; run through the simulator against numpy."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from vta_nets import HEIGHT, WIDTH, Pointwise, assembled, split

from lpsn_tvm.errors import ArtifactError, CompileError
from lpsn_tvm.schedules.vta.ops import Store, TileOp
from lpsn_tvm.targets.vta.config import PRESETS, VtaConfig
from lpsn_tvm.targets.vta.execute import execute
from lpsn_tvm.targets.vta.layout import ceil_div
from lpsn_tvm.targets.vta.network import HostStep
from lpsn_tvm.targets.vta.phases import split_into_phases
from lpsn_tvm.targets.vta.profile import profile
from lpsn_tvm.targets.vta.serialize import network_from_files, network_to_files


@pytest.fixture(params=["pynq", "pynq-0.0.2", "pynq-i4", "pynq-4x8", "pynq-i8w4"])
def config(request: pytest.FixtureRequest) -> VtaConfig:
    return PRESETS[request.param]


def test_programs_equal_numpy_in_every_geometry(config: VtaConfig) -> None:
    net = split(config)
    network = assembled(net.lowered("d", "c", "b"))
    x = net.feed()
    expected = net.evaluate(x)
    outputs = network.run({"x": x})
    assert list(outputs) == ["d", "c", "b"]
    for name, value in outputs.items():
        np.testing.assert_array_equal(value, expected[name])


def test_units_may_run_in_any_order() -> None:
    net = split(PRESETS["pynq"])
    network, x = assembled(net.lowered("d", "c")), net.feed()
    expected = net.evaluate(x)
    for seed in range(5):
        outputs = execute(network, {"x": x}, model=None, interleaving=seed).outputs
        np.testing.assert_array_equal(outputs["d"], expected["d"])
        np.testing.assert_array_equal(outputs["c"], expected["c"])


def test_host_steps_split_as_rarely_as_operands_allow() -> None:
    phases = split_into_phases(split(PRESETS["pynq"]).lowered("d", "c"))
    names = [[step.output if isinstance(step, HostStep) else step.name for step in phase] for phase in phases]
    assert names == [["a", "b", "c"], ["h"], ["d"]]


def test_borders_have_regions_of_their_own_and_the_rest_is_in_the_arena() -> None:
    network = assembled(split(PRESETS["pynq"]).lowered("d", "c"))
    first, second = network.device_steps
    assert [(t.name, t.region) for t in first.inputs] == [("x", "input")]
    assert [(t.name, t.region) for t in first.outputs] == [("b", "output.0"), ("c", "output.1")]
    assert [(t.name, t.region) for t in second.inputs + second.outputs] == [("h", "input"), ("d", "output")]
    assert {r.name: r.access for r in first.program.regions.values()} == {
        "input": "r", "output.0": "w", "output.1": "w", "arena": "rw", "weight": "r", "vector": "r", "uop": "r",
    }  # fmt: skip
    assert first.peak_arena == ceil_div(3 * HEIGHT * WIDTH * 16, 64) * 64
    assert second.peak_arena == 0


@pytest.mark.parametrize("is_output", [True, False])
def test_a_tensor_filled_by_two_programs(is_output: bool) -> None:
    """a and b are the halves of a concatenation; b waits for the host, so the first program hands the tensor on."""
    net = Pointwise(PRESETS["pynq"])
    for name, source in (("a", "x"), ("p", "x"), ("h", "p"), ("b", "h")):
        (net.host if name == "h" else lambda n, s: net.conv(n, s, 16))(name, source)
    net.shapes["cat"] = 32
    whole = net.plane("cat")
    for index, step in enumerate(net.steps):
        if isinstance(step, TileOp) and step.name in "ab":
            half = replace(whole, base=HEIGHT * WIDTH * "ab".index(step.name), blocks=1)
            net.steps[index] = replace(step, steps=(*step.steps[:-1], Store(half)))
    net.conv("c", "cat", 24)
    network = assembled(net.lowered("c", "cat") if is_output else net.lowered("c"))
    assert [[op.name for op in step.ops] for step in network.device_steps] == [["a", "p"], ["b", "c"]]
    x = net.feed()
    values = {"x": x}
    for name, source, function in net.meaning:
        values[name] = function(values[source])
        if name == "b":
            values["cat"] = np.concatenate([values["a"], values["b"]], axis=1)
    for name, value in network.run({"x": x}).items():
        np.testing.assert_array_equal(value, values[name])


def test_a_long_chain_reuses_memory() -> None:
    net = Pointwise(PRESETS["pynq"], 16)
    source = "x"
    for index in range(6):
        net.conv(f"l{index}", source, 16)
        source = f"l{index}"
    network = assembled(net.lowered(source))
    assert network.peak_arena == 2 * ceil_div(HEIGHT * WIDTH * 16, 64) * 64
    x = net.feed()
    np.testing.assert_array_equal(network.run({"x": x})[source], net.evaluate(x)[source])


def test_files_bring_back_the_same_network(config: VtaConfig) -> None:
    net = split(config)
    network = assembled(net.lowered("d", "c"))
    record, blobs = network_to_files(network)
    again = network_from_files(json.loads(json.dumps(record)), blobs)
    x = net.feed()
    for name, value in network.run({"x": x}).items():
        np.testing.assert_array_equal(again.run({"x": x})[name], value)
    for old, new in zip(network.device_steps, again.device_steps, strict=True):
        assert (old.ops, old.schedules, old.inputs, old.outputs) == (new.ops, new.schedules, new.inputs, new.outputs)
        assert list(old.program.instructions) == list(new.program.instructions)
    assert network_to_files(again)[0] == record


@pytest.mark.parametrize("key", ["steps", "config", "outputs"])
def test_incomplete_records_are_refused(key: str) -> None:
    record, blobs = network_to_files(assembled(split(PRESETS["pynq"]).lowered("d")))
    with pytest.raises(ArtifactError, match=key):
        network_from_files({k: v for k, v in record.items() if k != key}, blobs)
    with pytest.raises(ArtifactError, match=r"insn\.bin"):
        network_from_files(record, {k: v for k, v in blobs.items() if not k.endswith("insn.bin")})


def test_the_profile_adds_up() -> None:
    net = split(PRESETS["pynq"])
    report = profile(assembled(net.lowered("d", "c")))
    assert [(step.name, step.place) for step in report.steps] == [
        ("a", "accelerator"), ("b", "accelerator"), ("c", "accelerator"), ("h", "host"), ("d", "accelerator"),
    ]  # fmt: skip
    for model in ("rtl", "pynq"):
        assert sum(step.cycles.get(model, 0) for step in report.steps) == report.cycles[model] > 0
        assert 0 < report.utilization(model) < 1
        assert report.milliseconds[model] == report.cycles[model] / 1e5
    assert report.cycles["rtl"] < report.cycles["pynq"]
    moved = {step.name: step.dram_bytes for step in report.steps}
    # At least its weights, its input and its output.
    assert moved["b"] > 2 * 3 * 256 + HEIGHT * WIDTH * 16 * (3 + 2)


def test_what_is_missing_is_named() -> None:
    net = split(PRESETS["pynq"])
    lowered = net.lowered("d")
    with pytest.raises(CompileError, match="'b'"):
        assembled(replace(lowered, steps=lowered.steps[2:]))
    with pytest.raises(CompileError, match="nonesuch"):
        assembled(replace(lowered, outputs=("nonesuch",)))
    with pytest.raises(CompileError, match="x: input is missing"):
        assembled(lowered).run({})
