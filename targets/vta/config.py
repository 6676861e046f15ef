"""Geometry of an accelerator build: the values of vta_config.json, what follows from them, and the rules they obey.

Three sums decide whether a geometry can be encoded at all, with acc, inp, wgt, uop the log2 of the buffer depths:
a micro-op has 32 bits, the factors of a GEMM 64, the factors and the operand of an ALU instruction 64. For the default
(uop 13, acc 11, inp 11, wgt 10) all three are exactly full.

Source: the public VTA hardware repository (config/vta_config.json, include/vta/hw_spec.h, config/pkg_config.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lpsn_tvm.errors import TargetError
from lpsn_tvm.targets.vta.config_rules import RULES

IsaVersion = Literal["0.0.1", "0.0.2"]
Hardware = Literal["pynq", "ultra96"]

UOP_DEPTH_LIMIT = 2048
"""Micro-ops that every design has room for, whatever the configuration says (the Chisel design has no more)."""

# TARGET in vta_config.json -> whose clock, bus and register map apply; simulators stand for the PYNQ build.
_TARGETS: dict[str, Hardware] = {
    "pynq": "pynq",
    "sim": "pynq",
    "tsim": "pynq",
    "ultra96": "ultra96",
    "zcu104": "ultra96",
}
_LOG_BUS_WIDTH: dict[str, int] = {"pynq": 6, "ultra96": 7}
_CLOCK_MHZ: dict[str, float] = {"pynq": 100.0, "ultra96": 333.0}


@dataclass(frozen=True)
class VtaConfig:
    """One build of the accelerator; every rule is checked on construction.

    Parameters
    ----------
    log_inp_width, log_wgt_width, log_acc_width, log_out_width : int
        log2 of the bits of inputs, weights, accumulators (5) and outputs (as inputs).
    log_batch, log_block_in, log_block_out : int
        log2 of the tile extents; both blocks are equal, since an output tile is the next layer's input tile.
    log_uop_buff_size, log_inp_buff_size, log_wgt_buff_size, log_acc_buff_size : int
        log2 of the buffer sizes in bytes.
    log_bus_width : int
        log2 of the bits per memory transfer; no tile but the micro-op may be smaller.
    isa_version : {"0.0.1", "0.0.2"}
        Encoding of the instructions. The wrong one gives silently wrong data.
    hardware : {"pynq", "ultra96"}
        Register map.
    clock_mhz : float
        Clock of the programmable logic.

    Raises
    ------
    TargetError
        A rule is broken; the message names it and the numbers.
    """

    log_inp_width: int = 3
    log_wgt_width: int = 3
    log_acc_width: int = 5
    log_out_width: int = 3
    log_batch: int = 0
    log_block_in: int = 4
    log_block_out: int = 4
    log_uop_buff_size: int = 15
    log_inp_buff_size: int = 15
    log_wgt_buff_size: int = 18
    log_acc_buff_size: int = 17
    log_bus_width: int = 6
    isa_version: IsaVersion = "0.0.1"
    hardware: Hardware = "pynq"
    clock_mhz: float = 100.0

    def __post_init__(self) -> None:
        for rule in RULES:
            rule(self)

    @property
    def name(self) -> str:
        """Configuration name as the hardware repository writes it, `1x16_i8w8a32_15_15_18_17`."""
        return (
            f"{self.batch}x{self.block_in}_i{self.inp_bits}w{self.wgt_bits}a{self.acc_bits}_{self.log_uop_buff_size}"
            f"_{self.log_inp_buff_size}_{self.log_wgt_buff_size}_{self.log_acc_buff_size}"
        )

    @property
    def batch(self) -> int:
        """Rows of an input and accumulator tile."""
        return 1 << self.log_batch

    @property
    def block_in(self) -> int:
        """Input channels of a tile."""
        return 1 << self.log_block_in

    @property
    def block_out(self) -> int:
        """Output channels of a tile."""
        return 1 << self.log_block_out

    @property
    def inp_bits(self) -> int:
        """Bits of an input value."""
        return 1 << self.log_inp_width

    @property
    def wgt_bits(self) -> int:
        """Bits of a weight."""
        return 1 << self.log_wgt_width

    @property
    def acc_bits(self) -> int:
        """Bits of an accumulator, 32."""
        return 1 << self.log_acc_width

    @property
    def out_bits(self) -> int:
        """Bits of an output value, as of an input value."""
        return 1 << self.log_out_width

    @property
    def inp_tile_bytes(self) -> int:
        """Bytes of an input tile [BATCH][BLOCK_IN]."""
        return self.batch * self.block_in * self.inp_bits // 8

    @property
    def wgt_tile_bytes(self) -> int:
        """Bytes of a weight tile [BLOCK_OUT][BLOCK_IN]."""
        return self.block_out * self.block_in * self.wgt_bits // 8

    @property
    def acc_tile_bytes(self) -> int:
        """Bytes of an accumulator tile [BATCH][BLOCK_OUT]."""
        return self.batch * self.block_out * self.acc_bits // 8

    @property
    def out_tile_bytes(self) -> int:
        """Bytes of an output tile [BATCH][BLOCK_OUT]."""
        return self.batch * self.block_out * self.out_bits // 8

    @property
    def uop_tile_bytes(self) -> int:
        """Bytes of a micro-op."""
        return 4

    @property
    def inp_depth(self) -> int:
        """Input tiles on chip."""
        return (1 << self.log_inp_buff_size) // self.inp_tile_bytes

    @property
    def wgt_depth(self) -> int:
        """Weight tiles on chip."""
        return (1 << self.log_wgt_buff_size) // self.wgt_tile_bytes

    @property
    def acc_depth(self) -> int:
        """Accumulator tiles on chip; as many output tiles."""
        return (1 << self.log_acc_buff_size) // self.acc_tile_bytes

    @property
    def uop_depth(self) -> int:
        """Micro-ops that a program may keep on chip (at most 2048)."""
        return min(UOP_DEPTH_LIMIT, (1 << self.log_uop_buff_size) // self.uop_tile_bytes)

    @property
    def inp_index_bits(self) -> int:
        """Bits of a field that counts input tiles."""
        return self.inp_depth.bit_length() - 1

    @property
    def wgt_index_bits(self) -> int:
        """Bits of a field that counts weight tiles."""
        return self.wgt_depth.bit_length() - 1

    @property
    def acc_index_bits(self) -> int:
        """Bits of a field that counts accumulator tiles."""
        return self.acc_depth.bit_length() - 1

    @property
    def uop_index_bits(self) -> int:
        """Bits of a field that counts micro-ops: of the configured buffer, also where less of it is used."""
        return self.log_uop_buff_size - 2

    def to_json(self) -> dict[str, Any]:
        """The keys of vta_config.json, and isa_version, LOG_BUS_WIDTH and clock_mhz."""
        values: dict[str, Any] = {"TARGET": self.hardware, "HW_VER": self.isa_version}
        values |= {name.upper(): getattr(self, name) for name in _LOG_FIELDS}
        if self.log_block_in == self.log_block_out:
            values["LOG_BLOCK"] = self.log_block_in  # what the hardware's own build scripts read
        return values | {"isa_version": self.isa_version, "clock_mhz": self.clock_mhz}

    @classmethod
    def from_json(cls, values: object, *, where: str = "vta_config.json") -> VtaConfig:
        """A configuration from the (untrusted) contents of a vta_config.json.

        Optional keys: LOG_OUT_WIDTH (as LOG_INP_WIDTH), TARGET (pynq), LOG_BUS_WIDTH and clock_mhz (of TARGET), and
        isa_version (HW_VER, or 0.0.1). LOG_BLOCK may stand for LOG_BLOCK_IN and LOG_BLOCK_OUT.

        Raises
        ------
        TargetError
            A key is unknown, missing or of the wrong type, or a rule is broken.
        """
        if not isinstance(values, Mapping):
            raise TargetError(f"expected a JSON object, got {type(values).__name__}", where=where)
        given = _typed(values, where)
        hardware = _TARGETS[given.pop("TARGET", "pynq")]
        isa_version = _isa_version(given, where)
        block = given.pop("LOG_BLOCK", None)
        for key in ("LOG_BLOCK_IN", "LOG_BLOCK_OUT"):
            if block is not None and given.setdefault(key, block) != block:
                raise TargetError(f"LOG_BLOCK is {block} but {key} is {given[key]}", where=where)
        given.setdefault("LOG_BUS_WIDTH", _LOG_BUS_WIDTH[hardware])
        given.setdefault("clock_mhz", _CLOCK_MHZ[hardware])
        if "LOG_INP_WIDTH" in given:
            given.setdefault("LOG_OUT_WIDTH", given["LOG_INP_WIDTH"])
        missing = [name.upper() for name in _LOG_FIELDS if name.upper() not in given]
        if missing:
            raise TargetError(f"missing {', '.join(missing)}", where=where)
        try:
            fields = {key.lower(): value for key, value in given.items()}
            return cls(**fields, hardware=hardware, isa_version=isa_version)
        except TargetError as error:
            raise TargetError(str(error), where=where) from error

    @classmethod
    def read(cls, path: str | Path) -> VtaConfig:
        """The configuration in a vta_config.json file.

        Raises
        ------
        TargetError
            The file cannot be read, is not JSON, or is no valid configuration.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise TargetError(f"cannot be read as JSON: {error}", where=str(path)) from error
        return cls.from_json(values, where=str(path))

    def write(self, path: str | Path) -> None:
        """Write vta_config.json.

        Raises
        ------
        TargetError
            The file cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise TargetError(f"cannot be written: {error}", where=str(path)) from error


_LOG_FIELDS = tuple(name for name in VtaConfig.__dataclass_fields__ if name.startswith("log_"))
_KEYS = (*(name.upper() for name in _LOG_FIELDS), "LOG_BLOCK", "TARGET", "HW_VER", "isa_version", "clock_mhz")


def _typed(values: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """The values, each known by name and of its type."""
    for key, value in values.items():
        if key not in _KEYS:
            raise TargetError(f"unknown key {key!r}; known: {', '.join(_KEYS)}", where=where)
        if key in ("TARGET", "HW_VER", "isa_version"):
            expected, fits = "a string", isinstance(value, str)
        elif key == "clock_mhz":
            expected, fits = "a number", isinstance(value, (int, float)) and not isinstance(value, bool)
        else:
            expected, fits = "an integer", isinstance(value, int) and not isinstance(value, bool)
        if not fits:
            raise TargetError(f"{key} must be {expected}, got {value!r}", where=where)
    if values.get("TARGET", "pynq") not in _TARGETS:
        raise TargetError(f"TARGET must be one of {', '.join(_TARGETS)}, got {values['TARGET']!r}", where=where)
    return dict(values)


def _isa_version(given: dict[str, Any], where: str) -> IsaVersion:
    """`isa_version`, or HW_VER where it is missing; they must not contradict each other."""
    hw_ver = given.pop("HW_VER", None)
    version = given.pop("isa_version", hw_ver or "0.0.1")
    for known in get_args(IsaVersion):
        if version == known:
            if hw_ver in get_args(IsaVersion) and hw_ver != version:
                raise TargetError(f"isa_version is {version} but HW_VER is {hw_ver}", where=where)
            return known  # type: ignore[no-any-return]
    key = "HW_VER" if version == hw_ver else "isa_version"
    raise TargetError(f"{key} is {version!r}; isa_version must be one of {get_args(IsaVersion)}", where=where)


PRESETS: dict[str, VtaConfig] = {
    "pynq": VtaConfig(),
    "pynq-0.0.2": VtaConfig(isa_version="0.0.2"),
    "ultra96": VtaConfig(log_bus_width=7, hardware="ultra96", clock_mhz=_CLOCK_MHZ["ultra96"]),
    "pynq-4x8": VtaConfig(
        log_batch=2, log_block_in=3, log_block_out=3, log_inp_buff_size=16, log_wgt_buff_size=16, log_acc_buff_size=18
    ),
    "pynq-i4": VtaConfig(log_inp_width=2, log_wgt_width=2, log_out_width=2, log_inp_buff_size=14, log_wgt_buff_size=17),
    # 4-bit weights halve the weight tile; the same 1024 of them need half the buffer.
    "pynq-i8w4": VtaConfig(log_wgt_width=2, log_wgt_buff_size=17),
}
"""Builds by name. Bitstreams are published for the 8-bit ones; the others are built from the hardware sources."""

PREBUILT: frozenset[str] = frozenset({"pynq", "pynq-0.0.2", "ultra96", "pynq-4x8"})
"""Presets whose bitstreams are published."""

_DEFAULTS = {(8, 8): "pynq", (4, 4): "pynq-i4", (4, 8): "pynq-i8w4"}


def preset(name: str) -> VtaConfig:
    """A preset by its key ("pynq") or by full configuration name ("1x16_i8w8a32_15_15_18_17": the first that has it).

    Raises
    ------
    TargetError
        There is none; the message lists the presets.
    """
    if name in PRESETS:
        return PRESETS[name]
    for config in PRESETS.values():
        if config.name == name:
            return config
    known = ", ".join(f"{key} ({config.name})" for key, config in PRESETS.items())
    raise TargetError(f"unknown VTA configuration {name!r}; presets: {known}; or give a vta_config.json", where="VTA")


def default_config(bits: tuple[int, int]) -> VtaConfig:
    """The preset for (weights, activations) bits: (8, 8), (4, 4) or (4, 8).

    Raises
    ------
    TargetError
        The accelerator has no geometry for them.
    """
    if bits not in _DEFAULTS:
        allowed = ", ".join(f"{key} -> {name}" for key, name in _DEFAULTS.items())
        raise TargetError(f"no VTA preset for (weights, activations) = {bits} bits; allowed: {allowed}", where="bits")
    return PRESETS[_DEFAULTS[bits]]
