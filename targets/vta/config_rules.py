"""Rules that a geometry of the accelerator obeys, one function each; each error names its rule and the numbers.

Source: the public VTA hardware repository (include/vta/hw_spec.h, hardware/chisel/src/main/scala/core/ISA.scala).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lpsn_tvm.errors import TargetError

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig

# Lowest and highest log2; a buffer beyond 2**24 bytes exists on no FPGA.
_RANGES = {
    "log_inp_width": (1, 3),
    "log_wgt_width": (1, 3),
    "log_acc_width": (5, 5),
    "log_out_width": (1, 3),
    "log_batch": (0, 6),
    "log_block_in": (0, 6),
    "log_block_out": (0, 6),
    "log_uop_buff_size": (3, 24),
    "log_inp_buff_size": (3, 24),
    "log_wgt_buff_size": (3, 24),
    "log_acc_buff_size": (3, 24),
    "log_bus_width": (5, 9),
}
# Widest index fields that all designs have (the Chisel design's are fixed).
_INDEX_BITS = {"uop": 13, "inp": 11, "wgt": 10, "acc": 11}


def _broken(rule: str, message: str) -> TargetError:
    return TargetError(f"rule {rule!r}: {message}", where="VTA configuration")


def check_ranges(config: VtaConfig) -> None:
    """Every log2 is an integer in its range (so every extent is a power of two)."""
    for name, (low, high) in _RANGES.items():
        value = getattr(config, name)
        if type(value) is not int or not low <= value <= high:
            raise _broken("range", f"{name.upper()} must be an integer from {low} to {high}, got {value!r}")


def check_hardware(config: VtaConfig) -> None:
    """Encoding, hardware and clock are known ones."""
    if config.isa_version not in ("0.0.1", "0.0.2"):
        raise _broken("isa version", f"isa_version must be '0.0.1' or '0.0.2', got {config.isa_version!r}")
    if config.hardware not in ("pynq", "ultra96"):
        raise _broken("hardware", f"hardware must be 'pynq' or 'ultra96', got {config.hardware!r}")
    clock = config.clock_mhz
    if isinstance(clock, bool) or not isinstance(clock, (int, float)) or not (math.isfinite(clock) and clock > 0):
        raise _broken("clock", f"clock_mhz must be a positive number, got {clock!r}")


def check_output_width(config: VtaConfig) -> None:
    """Outputs are inputs of the next layer: same width, same block."""
    if config.log_out_width != config.log_inp_width:
        raise _broken(
            "output width = input width",
            f"LOG_OUT_WIDTH is {config.log_out_width} ({config.out_bits} bits), "
            f"LOG_INP_WIDTH {config.log_inp_width} ({config.inp_bits} bits)",
        )
    if config.log_block_in != config.log_block_out:
        raise _broken(
            "BLOCK_IN = BLOCK_OUT",
            f"LOG_BLOCK_IN is {config.log_block_in} ({config.block_in} channels), "
            f"LOG_BLOCK_OUT {config.log_block_out} ({config.block_out} channels)",
        )


def check_tiles(config: VtaConfig) -> None:
    """No tile is smaller than one bus word."""
    bus = 1 << config.log_bus_width
    tiles = {
        "INP": config.batch * config.block_in * config.inp_bits,
        "WGT": config.block_out * config.block_in * config.wgt_bits,
        "ACC": config.batch * config.block_out * config.acc_bits,
        "OUT": config.batch * config.block_out * config.out_bits,
    }
    for name, bits in tiles.items():
        if bits < bus:
            raise _broken("tile >= bus word", f"a tile of {name} has {bits} bits, a bus word {bus}")


def check_buffers(config: VtaConfig) -> None:
    """Every buffer holds at least two tiles, so that its index has a bit."""
    for name, depth in (("INP", config.inp_depth), ("WGT", config.wgt_depth), ("ACC", config.acc_depth)):
        if depth < 2:
            size = getattr(config, f"log_{name.lower()}_buff_size")
            tile = getattr(config, f"{name.lower()}_tile_bytes")
            raise _broken(
                "buffer >= 2 tiles", f"LOG_{name}_BUFF_SIZE {size} is {1 << size} bytes, a tile has {tile} bytes"
            )


def check_fields(config: VtaConfig) -> None:
    """Micro-ops have 32 bits, each word of an instruction 64; index fields are no wider than every design's."""
    acc, inp, wgt, uop = (
        config.acc_index_bits,
        config.inp_index_bits,
        config.wgt_index_bits,
        config.uop_index_bits,
    )
    operand = 20 if config.isa_version == "0.0.2" else 19  # ALU op 3 or 2 bits, use_imm 1, imm 16
    sums = (
        ("acc + max(acc, inp) + wgt <= 32 (micro-op)", acc + max(acc, inp) + wgt, 32),
        ("2 * (acc + inp + wgt) <= 64 (GEMM factors)", 2 * (acc + inp + wgt), 64),
        (f"4 * acc + {operand} <= 64 (ALU factors and operand)", 4 * acc + operand, 64),
        ("2 * uop + 37 <= 64 (GEMM and ALU loops)", 2 * uop + 37, 64),
    )
    for rule, bits, limit in sums:
        if bits > limit:
            raise _broken(rule, f"{bits} bits with index bits acc {acc}, inp {inp}, wgt {wgt}, uop {uop}")
    for name, limit in _INDEX_BITS.items():
        bits = getattr(config, f"{name}_index_bits")
        if bits > limit:
            raise _broken(
                f"{name} depth <= 2**{limit}",
                f"LOG_{name.upper()}_BUFF_SIZE {getattr(config, f'log_{name}_buff_size')} gives 2**{bits} tiles",
            )


RULES = (check_ranges, check_hardware, check_output_width, check_tiles, check_buffers, check_fields)
"""In the order they are checked: later ones rely on earlier ones."""
