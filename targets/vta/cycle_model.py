"""Timing constants of the accelerator as data: what the simulator's cycle model reads.

Two presets: "rtl", the generated hardware at full memory rate (one bus word per cycle), and "pynq", which reproduces a
PYNQ-Z1 at 100 MHz (half that rate, two cycles per immediate ALU micro-operation as in the HLS design).

Source: the public VTA hardware repository (Chisel and HLS designs) and TVM's published tuning logs.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

from lpsn_tvm.errors import TargetError

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig

ModelName = Literal["rtl", "pynq"]


@dataclass(frozen=True)
class CycleModel:
    """Cycles of everything that takes time; all values are cycles unless stated.

    Parameters
    ----------
    word_cycles : int
        Cycles per bus word: 1 is 8 bytes per cycle on a 64-bit bus.
    read_latency : int
        From an accepted read burst to its first word.
    burst_bytes : int
        Longest burst in bytes; a burst never crosses a multiple of it.
    outstanding : int
        Read bursts in flight.
    fetch_chunk : int
        Instructions read at once.
    command_queue : int
        Instructions that wait per unit.
    load_start, load_end : int
        Around the data of a load.
    padding_start : int
        Before a run of padding tiles (one cycle each).
    compute_overhead : int
        Of a GEMM or ALU instruction besides its micro-operations.
    alu_immediate, alu_tensor : int
        Per ALU micro-operation.
    nop : int
        An instruction that does nothing.
    store_start, store_command, store_response, store_tile : int
        Per store, per burst before its data, per burst after it, per tile besides its words.
    token_latency : int
        From posting a token to the pop that sees it.
    sync : int
        In which an instruction pops its tokens.
    idle : int
        Between two instructions of one unit.
    """

    word_cycles: int = 1
    read_latency: int = 32
    burst_bytes: int = 2048
    outstanding: int = 16
    fetch_chunk: int = 128
    command_queue: int = 512
    load_start: int = 2
    load_end: int = 2
    padding_start: int = 1
    compute_overhead: int = 8
    alu_immediate: int = 1
    alu_tensor: int = 2
    nop: int = 1
    store_start: int = 1
    store_command: int = 4
    store_response: int = 4
    store_tile: int = 1
    token_latency: int = 1
    sync: int = 1
    idle: int = 1

    def __post_init__(self) -> None:
        for item in fields(self):
            value, least = getattr(self, item.name), 0 if item.name not in _POSITIVE else 1
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 31:
                raise TargetError(f"{value!r} is not a whole number >= {least}", where=f"cycle model, {item.name}")


_POSITIVE = ("word_cycles", "burst_bytes", "outstanding", "fetch_chunk", "command_queue", "alu_immediate", "alu_tensor")

MODELS: dict[str, CycleModel] = {
    "rtl": CycleModel(),
    "pynq": CycleModel(word_cycles=2, alu_immediate=2),
}


def cycle_model(model: str | CycleModel) -> CycleModel:
    """A preset by name, or the model itself.

    Raises
    ------
    TargetError
        No preset has this name.
    """
    if isinstance(model, CycleModel):
        return model
    if model not in MODELS:
        raise TargetError(f"unknown cycle model {model!r}; known are {', '.join(MODELS)}", where="simulate")
    return MODELS[model]


class CycleModelStruct(ctypes.Structure):
    """The model as the compiled core reads it: `word_bytes` follows from the configuration's bus."""

    _fields_ = [("word_bytes", ctypes.c_int64)] + [
        (name, ctypes.c_int64)
        for name in (
            "word_cycles read_latency burst_bytes outstanding fetch_chunk command_queue load_start load_end "
            "padding_start compute_overhead alu_immediate alu_tensor nop store_start store_command store_response "
            "store_tile token_latency sync idle"
        ).split()
    ]


def model_struct(model: CycleModel, config: VtaConfig) -> CycleModelStruct:
    """The compiled core's view of a model on a configuration's bus."""
    struct = CycleModelStruct(word_bytes=(1 << config.log_bus_width) // 8)
    for item in fields(model):
        setattr(struct, item.name, getattr(model, item.name))
    return struct


def scaled(model: str | CycleModel, *, word_cycles: int) -> CycleModel:
    """The model with another memory rate."""
    return replace(cycle_model(model), word_cycles=word_cycles)
