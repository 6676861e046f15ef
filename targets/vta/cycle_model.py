"""Timing constants of the accelerator as data: what the simulator's cycle model reads.

Two presets: "rtl", the generated hardware at full memory rate (one bus word per cycle), and "pynq", which reproduces a
PYNQ-Z1 at 100 MHz (half that rate, two cycles per immediate ALU micro-operation as in the HLS design).

Source: the public VTA hardware repository (Chisel and HLS designs) and TVM's published tuning logs.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from lpsn_tvm.errors import TargetError

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig

ModelName = Literal["rtl", "pynq"]


@dataclass(frozen=True)
class CycleModel:
    """Cycles of everything that takes time; all values are cycles unless stated.

    An instruction starts in the cycle in which its unit is idle, the instruction is there and its tokens are seen; the
    values count from that cycle to the instruction's last one, in which it posts its tokens.

    Parameters
    ----------
    word_cycles : int
        Cycles per bus word: 1 is 8 bytes per cycle on a 64-bit bus.
    read_latency : int
        From an accepted read burst to the arrival of its first word. The hardware repository's simulated memory takes
        16, the memory engine 3.
    burst_bytes : int
        Longest burst in bytes; a burst never crosses a multiple of it.
    outstanding : int
        Read bursts in flight.
    command_interval : int
        Between two bursts of one client.
    fetch_chunk : int
        Instructions read at once, then dispatched one per cycle before the next chunk is asked for.
    command_queue : int
        Instructions that wait per unit, the executing one included.
    load_start, load_end : int
        Before the first burst is accepted, after the last word has arrived.
    padding_start : int
        Before padding tiles, which take the cycles that bring no data.
    compute_overhead : int
        Of a GEMM or ALU instruction besides its micro-operations.
    alu_immediate, alu_tensor : int
        Per ALU micro-operation.
    nop : int
        An instruction that does nothing, and FINISH.
    store_command, store_response : int
        Before and after the data of a write burst.
    store_tile : int
        To read the next tile (row of a tile where BATCH > 1), besides its words.
    token_latency : int
        From posting a token to the first cycle that sees it.
    idle : int
        From an instruction's last cycle to the start of the next one.
    """

    word_cycles: int = 1
    read_latency: int = 19
    burst_bytes: int = 2048
    outstanding: int = 16
    command_interval: int = 2
    fetch_chunk: int = 128
    command_queue: int = 512
    load_start: int = 2
    load_end: int = 2
    padding_start: int = 1
    compute_overhead: int = 6
    alu_immediate: int = 1
    alu_tensor: int = 2
    nop: int = 1
    store_command: int = 3
    store_response: int = 4
    store_tile: int = 1
    token_latency: int = 1
    idle: int = 1

    def __post_init__(self) -> None:
        for item in fields(self):
            value, least = getattr(self, item.name), 0 if item.name not in _POSITIVE else 1
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 31:
                raise TargetError(f"{value!r} is not a whole number >= {least}", where=f"cycle model, {item.name}")


_POSITIVE = (
    "word_cycles read_latency burst_bytes outstanding command_interval fetch_chunk command_queue load_start "
    "alu_immediate alu_tensor nop token_latency idle"
).split()

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

    _fields_ = [("word_bytes", ctypes.c_int64), *((item.name, ctypes.c_int64) for item in fields(CycleModel))]


def model_struct(model: CycleModel, config: VtaConfig) -> CycleModelStruct:
    """The compiled core's view of a model on a configuration's bus."""
    struct = CycleModelStruct(word_bytes=(1 << config.log_bus_width) // 8)
    for item in fields(model):
        setattr(struct, item.name, getattr(model, item.name))
    return struct
