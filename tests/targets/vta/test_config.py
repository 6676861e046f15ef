"""Configurations: presets, vta_config.json, and every rule that a geometry must obey."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpsn_tvm.errors import TargetError
from lpsn_tvm.targets.vta.config import PREBUILT, PRESETS, VtaConfig, default_config, preset
from lpsn_tvm.targets.vta.config_rules import RULES

UPSTREAM = {
    "TARGET": "sim",
    "HW_VER": "0.0.2",
    "LOG_INP_WIDTH": 3,
    "LOG_WGT_WIDTH": 3,
    "LOG_ACC_WIDTH": 5,
    "LOG_BATCH": 0,
    "LOG_BLOCK": 4,
    "LOG_UOP_BUFF_SIZE": 15,
    "LOG_INP_BUFF_SIZE": 15,
    "LOG_WGT_BUFF_SIZE": 18,
    "LOG_ACC_BUFF_SIZE": 17,
}


@pytest.mark.parametrize(
    ("key", "name", "tiles", "bus"),
    [
        ("pynq", "1x16_i8w8a32_15_15_18_17", (16, 256, 64, 16), 6),
        ("pynq-0.0.2", "1x16_i8w8a32_15_15_18_17", (16, 256, 64, 16), 6),
        ("ultra96", "1x16_i8w8a32_15_15_18_17", (16, 256, 64, 16), 7),
        ("pynq-4x8", "4x8_i8w8a32_15_16_16_18", (32, 64, 128, 32), 6),
        ("pynq-i4", "1x16_i4w4a32_15_14_17_17", (8, 128, 64, 8), 6),
        ("pynq-i8w4", "1x16_i8w4a32_15_15_17_17", (16, 128, 64, 16), 6),
    ],
)
def test_presets(key: str, name: str, tiles: tuple[int, ...], bus: int) -> None:
    config = PRESETS[key]
    assert config.name == name
    assert (config.inp_tile_bytes, config.wgt_tile_bytes, config.acc_tile_bytes, config.out_tile_bytes) == tiles
    assert (config.inp_depth, config.wgt_depth, config.acc_depth, config.uop_depth) == (2048, 1024, 2048, 2048)
    assert (config.inp_index_bits, config.wgt_index_bits, config.acc_index_bits) == (11, 10, 11)
    assert config.uop_index_bits == 13
    assert config.log_bus_width == bus
    assert preset(key) is config
    assert preset(name).name == name


def test_versions_and_clocks_of_presets() -> None:
    assert [config.isa_version for config in PRESETS.values()].count("0.0.2") == 1
    assert PRESETS["pynq-0.0.2"].isa_version == "0.0.2"
    assert (PRESETS["pynq"].clock_mhz, PRESETS["ultra96"].clock_mhz) == (100.0, 333.0)
    assert PREBUILT <= set(PRESETS)
    assert all(PRESETS[key].inp_bits == PRESETS[key].wgt_bits == 8 for key in PREBUILT)


def test_unknown_preset_lists_all() -> None:
    with pytest.raises(TargetError, match=r"unknown VTA configuration 'zynq'.*pynq-i4 \(1x16_i4w4a32_15_14_17_17\)"):
        preset("zynq")


@pytest.mark.parametrize(("bits", "key"), [((8, 8), "pynq"), ((4, 4), "pynq-i4"), ((4, 8), "pynq-i8w4")])
def test_default_config(bits: tuple[int, int], key: str) -> None:
    assert default_config(bits) is PRESETS[key]
    assert (default_config(bits).wgt_bits, default_config(bits).inp_bits) == bits


@pytest.mark.parametrize("bits", [(8, 4), (2, 2), (5, 8)])
def test_default_config_lists_what_is_allowed(bits: tuple[int, int]) -> None:
    with pytest.raises(TargetError, match=r"allowed: \(8, 8\) -> pynq, \(4, 4\) -> pynq-i4, \(4, 8\) -> pynq-i8w4"):
        default_config(bits)


@pytest.mark.parametrize("key", PRESETS)
def test_json_round_trip(key: str, tmp_path: Path) -> None:
    config = PRESETS[key]
    assert VtaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    config.write(tmp_path / "vta_config.json")
    assert VtaConfig.read(tmp_path / "vta_config.json") == config


def test_reads_the_hardware_repository_s_file() -> None:
    config = VtaConfig.from_json(UPSTREAM)
    assert config == replace(PRESETS["pynq"], isa_version="0.0.2")
    assert VtaConfig.from_json({**UPSTREAM, "TARGET": "ultra96", "HW_VER": "0.0.1"}) == PRESETS["ultra96"]
    by_block = {key: value for key, value in UPSTREAM.items() if key != "LOG_BLOCK"}
    assert VtaConfig.from_json({**by_block, "LOG_BLOCK_IN": 4, "LOG_BLOCK_OUT": 4}) == config
    assert VtaConfig.from_json({**UPSTREAM, "HW_VER": "1.7-mine", "isa_version": "0.0.2"}) == config


def test_default_values_are_the_first_preset() -> None:
    assert VtaConfig() == PRESETS["pynq"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"LOG_SHIFT": 3}, "unknown key 'LOG_SHIFT'; known: LOG_INP_WIDTH"),
        ({"LOG_BATCH": "0"}, "LOG_BATCH must be an integer, got '0'"),
        ({"LOG_BATCH": 1.0}, "LOG_BATCH must be an integer, got 1.0"),
        ({"LOG_BATCH": True}, "LOG_BATCH must be an integer, got True"),
        ({"LOG_BATCH": None}, "LOG_BATCH must be an integer, got None"),
        ({"TARGET": "de10nano"}, "TARGET must be one of pynq, sim, tsim, ultra96, zcu104, got 'de10nano'"),
        ({"TARGET": 3}, "TARGET must be a string, got 3"),
        ({"clock_mhz": "fast"}, "clock_mhz must be a number, got 'fast'"),
        ({"isa_version": "0.0.1"}, "isa_version is 0.0.1 but HW_VER is 0.0.2"),
        ({"HW_VER": "0.0.7"}, "HW_VER is '0.0.7'; isa_version must be one of"),
        ({"isa_version": "2"}, "isa_version is '2'; isa_version must be one of"),
        ({"LOG_BLOCK_IN": 3}, "LOG_BLOCK is 4 but LOG_BLOCK_IN is 3"),
        ({"LOG_BATCH": -1}, "vta_config.json: .*LOG_BATCH must be an integer from 0 to 6, got -1"),
        ({"LOG_BATCH": 10**30}, "LOG_BATCH must be an integer from 0 to 6"),
        ({"clock_mhz": float("nan")}, "clock_mhz must be a positive number"),
    ],
)
def test_bad_json(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        VtaConfig.from_json({**UPSTREAM, **change})


@pytest.mark.parametrize("key", [key for key in UPSTREAM if key.startswith("LOG_") and key != "LOG_BLOCK"])
def test_missing_key(key: str) -> None:
    with pytest.raises(TargetError, match=f"missing .*{key}"):
        VtaConfig.from_json({name: value for name, value in UPSTREAM.items() if name != key})


def test_missing_block_names_both() -> None:
    with pytest.raises(TargetError, match="missing LOG_BLOCK_IN, LOG_BLOCK_OUT"):
        VtaConfig.from_json({name: value for name, value in UPSTREAM.items() if name != "LOG_BLOCK"})


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x00", "[" * 100_000, '{"a": 1}'])
def test_files_that_are_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "vta_config.json"
    path.write_text(text)
    with pytest.raises(TargetError, match=r"vta_config\.json: "):
        VtaConfig.read(path)


def test_unreadable_and_unwritable_files(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot be read"):
        VtaConfig.read(tmp_path / "none.json")
    with pytest.raises(TargetError, match="cannot be read"):
        VtaConfig.read(tmp_path)
    with pytest.raises(TargetError, match="cannot be written"):
        PRESETS["pynq"].write(tmp_path / "no" / "vta_config.json")


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"log_acc_width": 4}, "rule 'range': LOG_ACC_WIDTH must be an integer from 5 to 5, got 4"),
        ({"log_inp_width": 4}, "rule 'range': LOG_INP_WIDTH"),
        ({"log_batch": 1.5}, "rule 'range': LOG_BATCH"),
        ({"log_bus_width": 3}, "rule 'range': LOG_BUS_WIDTH"),
        ({"isa_version": "0.0.3"}, "rule 'isa version'"),
        ({"hardware": "stratix"}, "rule 'hardware'"),
        ({"clock_mhz": 0}, "rule 'clock'"),
        ({"log_out_width": 2}, r"rule 'output width = input width': LOG_OUT_WIDTH is 2 \(4 bits\)"),
        ({"log_block_out": 3}, r"rule 'BLOCK_IN = BLOCK_OUT': LOG_BLOCK_IN is 4 \(16 channels\)"),
        ({"log_inp_width": 2, "log_out_width": 2, "log_inp_buff_size": 14, "log_bus_width": 7},
         "rule 'tile >= bus word': a tile of INP has 64 bits, a bus word 128"),
        ({"log_block_in": 2, "log_block_out": 2, "log_inp_buff_size": 13, "log_wgt_width": 1},
         "rule 'tile >= bus word': a tile of INP has 32 bits, a bus word 64"),
        ({"log_block_in": 2, "log_block_out": 2, "log_batch": 4, "log_wgt_width": 1},
         "rule 'tile >= bus word': a tile of WGT has 32 bits, a bus word 64"),
        ({"log_wgt_buff_size": 8}, "rule 'buffer >= 2 tiles': LOG_WGT_BUFF_SIZE 8 is 256 bytes, a tile has 256"),
        ({"log_inp_buff_size": 4}, "rule 'buffer >= 2 tiles'"),
        ({"log_acc_buff_size": 5}, "rule 'buffer >= 2 tiles'"),
        ({"log_wgt_buff_size": 19}, r"rule 'acc \+ max\(acc, inp\) \+ wgt <= 32 \(micro-op\)': 33 bits"),
        ({"log_inp_buff_size": 16, "log_acc_buff_size": 16, "log_wgt_buff_size": 19},
         r"rule 'acc \+ max\(acc, inp\) \+ wgt <= 32 \(micro-op\)': 33 bits"),
        ({"log_inp_buff_size": 13, "log_acc_buff_size": 18}, r"\(micro-op\)': 34 bits with index bits acc 12, inp 9"),
        ({"log_inp_buff_size": 13, "log_acc_buff_size": 15, "log_wgt_buff_size": 22}, r"wgt depth <= 2\*\*10"),
        ({"log_acc_buff_size": 18, "log_wgt_buff_size": 16}, r"rule '4 \* acc \+ 19 <= 64"),
        ({"log_acc_buff_size": 18, "log_wgt_buff_size": 16, "isa_version": "0.0.2"}, r"rule '4 \* acc \+ 20 <= 64"),
        ({"log_uop_buff_size": 16}, r"rule '2 \* uop \+ 37 <= 64"),
        ({"log_inp_buff_size": 16, "log_acc_buff_size": 16}, r"rule 'inp depth <= 2\*\*11'.*gives 2\*\*12 tiles"),
    ],
)  # fmt: skip
def test_rules(changes: dict[str, Any], rule: str) -> None:
    """Each message has the rule and its numbers."""
    with pytest.raises(TargetError, match=rule):
        replace(PRESETS["pynq"], **changes)


LOGS = {field.name: st.integers(-1, 8) for field in fields(VtaConfig) if field.name.startswith("log_")}
LOGS |= {name: st.integers(2, 25) for name in LOGS if name.endswith("buff_size")}


@given(changes=st.fixed_dictionaries({}, optional=LOGS), version=st.sampled_from(["0.0.1", "0.0.2"]))
@settings(max_examples=300, derandomize=True)
def test_a_geometry_that_is_accepted_can_be_encoded(changes: dict[str, int], version: Any) -> None:
    """The three sums from the bit tables, and tiles that fill bus words."""
    try:
        config = replace(PRESETS["pynq"], isa_version=version, **changes)
    except TargetError:
        return
    acc, inp, wgt = config.acc_index_bits, config.inp_index_bits, config.wgt_index_bits
    assert 1 << acc == config.acc_depth
    assert acc + max(acc, inp) + wgt <= 32
    assert 2 * (acc + inp + wgt) <= 64
    assert 4 * acc + (20 if version == "0.0.2" else 19) <= 64
    assert min(config.inp_tile_bytes, config.wgt_tile_bytes, config.out_tile_bytes) * 8 >= 1 << config.log_bus_width
    assert VtaConfig.from_json(config.to_json()) == config


def test_every_rule_is_documented() -> None:
    assert all(rule.__doc__ for rule in RULES)
