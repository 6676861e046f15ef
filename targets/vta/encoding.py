"""128-bit instructions and 32-bit micro-ops to bits and back.

An instruction is two little-endian 64-bit words. Fields follow each other from the low bit of a word, in the order of
the tables below; no field crosses a word. The two versions differ in the width of the memory id and of the ALU
operation (2 bits in 0.0.1, 3 in 0.0.2), and with it in the place of everything after them. Fields that count tiles or
micro-ops are as wide as the log2 of the configured buffer depth.

Source: the public VTA hardware repository (include/vta/hw_spec.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lpsn_tvm.errors import ArtifactError, CompileError
from lpsn_tvm.targets.vta.config import VtaConfig
from lpsn_tvm.targets.vta.instructions import Alu, Finish, Gemm, Instruction, Load, Store

INSTRUCTION_BYTES = 16
MEMORY_IDS = {"uop": 0, "wgt": 1, "inp": 2, "acc": 3}
OUT_MEMORY_ID = 4
ALU_OPERATIONS = {"min": 0, "max": 1, "add": 2, "shr": 3}
_OPCODES: dict[type[Any], int] = {Load: 0, Store: 1, Gemm: 2, Finish: 3, Alu: 4}
_CODES = {"memory": MEMORY_IDS, "op": ALU_OPERATIONS}
_ITERATION_BITS = 14
_IMMEDIATE_BITS = 16
_FLAGS = ("pop_prev", "pop_next", "push_prev", "push_next")


@dataclass(frozen=True)
class Field:
    """Place of one instruction field: `bits` bits of `word` from bit `shift`."""

    name: str
    word: int
    shift: int
    bits: int
    signed: bool = False

    @property
    def low(self) -> int:
        """Lowest value that fits."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        """Highest value that fits."""
        return (1 << (self.bits - self.signed)) - 1

    @property
    def mask(self) -> int:
        """Its bits, at bit 0."""
        return (1 << self.bits) - 1


def _word(word: int, first: int, *widths: tuple[str, int]) -> list[Field]:
    """Consecutive fields from bit `first` on; fields named "" are reserved."""
    placed, shift = [], first
    for name, bits in widths:
        if name:
            placed.append(Field(name, word, shift, bits, signed=name == "imm"))
        shift += bits
    return placed


@lru_cache(maxsize=32)
def layout(config: VtaConfig) -> dict[type[Any], tuple[Field, ...]]:
    """Fields of every instruction but its opcode, in the order of the dataclass."""
    code = 3 if config.isa_version == "0.0.2" else 2
    uop, acc, inp, wgt = config.uop_index_bits, config.acc_index_bits, config.inp_index_bits, config.wgt_index_bits
    flags = _word(0, 3, *((name, 1) for name in _FLAGS))
    transfer = [("sram", 16), ("dram", 32)]
    extent = _word(1, 0, ("y_size", 16), ("x_size", 16), ("x_stride", 16))
    pads = _word(1, 48, ("y_pad_0", 4), ("y_pad_1", 4), ("x_pad_0", 4), ("x_pad_1", 4))
    loops = [("uop_begin", uop), ("uop_end", uop + 1), ("iter_out", _ITERATION_BITS), ("iter_in", _ITERATION_BITS)]
    dst = [("dst_out", acc), ("dst_in", acc)]
    gemm = [*dst, ("src_out", inp), ("src_in", inp), ("wgt_out", wgt), ("wgt_in", wgt)]
    alu = [*dst, ("src_out", acc), ("src_in", acc), ("op", code), ("use_imm", 1), ("imm", _IMMEDIATE_BITS)]
    tables = {
        Load: [*flags, *_word(0, 7, ("memory", code), *transfer), *extent, *pads],
        Store: [*flags, *_word(0, 7, ("", code), *transfer), *extent],
        Gemm: [*flags, *_word(0, 7, ("reset", 1), *loops), *_word(1, 0, *gemm)],
        Alu: [*flags, *_word(0, 7, ("", 1), *loops), *_word(1, 0, *alu)],
        Finish: flags,
    }
    ordered = {}
    for kind, table in tables.items():
        by_name = {field.name: field for field in table}
        ordered[kind] = tuple(by_name[item.name] for item in fields(kind))
    return ordered


def _fixed_bits(kind: type[Any], config: VtaConfig) -> int:
    """Bits of word 0 that are the same in all instructions of a kind."""
    # Version 0.0.1 has 2 bits for the memory id of a store, so the id of the output buffer is cut to 0.
    code_mask = 7 if config.isa_version == "0.0.2" else 3
    return _OPCODES[kind] | ((OUT_MEMORY_ID & code_mask) << 7 if kind is Store else 0)


def encode(instructions: Sequence[Instruction], config: VtaConfig) -> bytes:
    """16 bytes per instruction.

    Raises
    ------
    CompileError
        A value does not fit its field; names instruction, field, value and range.
    """
    words = np.zeros((len(instructions), 2), np.uint64)
    rows: dict[type[Any], list[int]] = {kind: [] for kind in _OPCODES}
    for index, instruction in enumerate(instructions):
        if type(instruction) not in rows:
            raise CompileError(f"not an instruction: {instruction!r}", where=f"instruction {index}")
        rows[type(instruction)].append(index)
    for kind, indices in rows.items():
        if not indices:
            continue
        table = layout(config)[kind]
        values = _values(kind, indices, [instructions[i] for i in indices], table)
        words[indices, 0] = _fixed_bits(kind, config)
        for column, field in enumerate(table):
            bits = (values[:, column] & field.mask).astype(np.uint64) << np.uint64(field.shift)
            words[indices, field.word] |= bits
    return words.astype("<u8").tobytes()


def _values(
    kind: type[Any], indices: list[int], instructions: list[Instruction], table: Sequence[Field]
) -> NDArray[np.int64]:
    """Field values [instruction, field], every one checked."""
    names = [field.name for field in table]
    rows = [list(row) for row in map(attrgetter(*names), instructions)]
    for column, name in enumerate(names):
        if name in _CODES:
            for index, row in zip(indices, rows, strict=True):
                row[column] = _code(kind, index, name, row[column])
    array = _integers(rows)
    if array is not None:
        low = np.array([_range(kind, field)[0] for field in table])
        high = np.array([_range(kind, field)[1] for field in table])
        if bool(((array >= low) & (array <= high)).all()):
            return array
    for index, row in zip(indices, rows, strict=True):
        for field, value in zip(table, row, strict=True):
            _check(kind, index, field, value)
    return np.array([[int(value) for value in row] for row in rows], np.int64)  # a mixture of numpy types


def _integers(rows: list[list[Any]]) -> NDArray[np.int64] | None:
    """The values as int64, or None if one is no Python integer or far too large."""
    try:
        array = np.asarray(rows)
    except (ValueError, OverflowError):  # a sequence among them
        return None
    return array.astype(np.int64) if array.dtype.kind in "bi" else None


def _range(kind: type[Any], field: Field) -> tuple[int, int]:
    """Allowed values: those of the field, and no flags at all on FINISH."""
    return (0, 0) if kind is Finish else (field.low, field.high)


def _code(kind: type[Any], index: int, name: str, value: Any) -> int:
    """Number of a memory or an ALU operation."""
    codes = _CODES[name]
    if not isinstance(value, str) or value not in codes:
        raise CompileError(
            f"{kind.__name__}: {name} is {value!r}, allowed: {', '.join(codes)}", where=f"instruction {index}"
        )
    return codes[value]


def _check(kind: type[Any], index: int, field: Field, value: Any) -> None:
    low, high = _range(kind, field)
    if not isinstance(value, (int, np.integer, np.bool_)) or not low <= value <= high:
        raise CompileError(
            f"{kind.__name__}: {field.name} is {value!r}, allowed: {low}..{high} ({field.bits} bits)",
            where=f"instruction {index}",
        )


def decode(data: bytes, config: VtaConfig) -> list[Instruction]:
    """Instructions from their encoding; exactly what `encode` would give, everything else is refused.

    Raises
    ------
    ArtifactError
        Length, opcode, memory, ALU operation or a reserved bit is not what this version encodes.
    """
    if len(data) % INSTRUCTION_BYTES:
        raise ArtifactError(f"{len(data)} bytes, not a multiple of {INSTRUCTION_BYTES}", where="instructions")
    words = np.frombuffer(data, "<u8").astype(np.uint64).reshape(-1, 2)
    opcodes = words[:, 0] & np.uint64(7)
    unknown = np.flatnonzero(opcodes > max(_OPCODES.values()))
    if unknown.size:
        _refuse(words, int(unknown[0]), f"opcode {opcodes[unknown[0]]} is unknown", config)
    instructions: list[Instruction | None] = [None] * len(words)
    for kind, opcode in _OPCODES.items():
        indices = np.flatnonzero(opcodes == opcode)
        if indices.size:
            for index, instruction in zip(indices.tolist(), _decoded(kind, words, indices, config), strict=True):
                instructions[index] = instruction
    return [instruction for instruction in instructions if instruction is not None]


def _decoded(
    kind: type[Any], words: NDArray[np.uint64], indices: NDArray[np.intp], config: VtaConfig
) -> list[Instruction]:
    """The instructions of one kind."""
    table = layout(config)[kind] if kind is not Finish else ()
    _check_fixed(kind, words, indices, table, config)
    columns: list[list[Any]] = []
    for field in table:
        raw = (words[indices, field.word] >> np.uint64(field.shift)) & np.uint64(field.mask)
        values = raw.astype(np.int64)
        if field.signed:
            values = np.where(values > field.high, values - (1 << field.bits), values)
        if field.name in _CODES:
            columns.append(_names(field.name, values, words, indices, config))
        else:
            is_flag = field.name in (*_FLAGS, "reset", "use_imm")
            columns.append((values.astype(bool) if is_flag else values).tolist())
    return [kind(*row) for row in zip(*columns, strict=True)] if columns else [kind() for _ in indices]


def _check_fixed(
    kind: type[Any],
    words: NDArray[np.uint64],
    indices: NDArray[np.intp],
    table: Sequence[Field],
    config: VtaConfig,
) -> None:
    """Bits outside of all fields are the opcode (and, for a store, the output buffer's id)."""
    for word, expected in ((0, _fixed_bits(kind, config)), (1, 0)):
        used = sum(field.mask << field.shift for field in table if field.word == word)
        rest = words[indices, word] & np.uint64(~used & (1 << 64) - 1)
        wrong = np.flatnonzero(rest != np.uint64(expected))
        if wrong.size:
            bits = int(rest[wrong[0]]) ^ expected
            message = f"{kind.__name__}: bits 0x{bits:x} of word {word} do not belong to the encoding"
            _refuse(words, int(indices[wrong[0]]), message, config)


def _names(
    name: str, values: NDArray[np.int64], words: NDArray[np.uint64], indices: NDArray[np.intp], config: VtaConfig
) -> list[str]:
    names = {code: text for text, code in _CODES[name].items()}
    for index, value in zip(indices, values, strict=True):
        if int(value) not in names:
            _refuse(words, int(index), f"{name} {value} is unknown (allowed: {names})", config)
    return [names[value] for value in values.tolist()]


def _refuse(words: NDArray[np.uint64], index: int, message: str, config: VtaConfig) -> None:
    raise ArtifactError(
        f"{message}; words 0x{int(words[index, 0]):016x} 0x{int(words[index, 1]):016x}, isa_version "
        f"{config.isa_version} (the wrong version looks like this)",
        where=f"instruction {index}",
    )


def _uop_fields(config: VtaConfig) -> tuple[Field, Field, Field]:
    acc, src, wgt = config.acc_index_bits, max(config.acc_index_bits, config.inp_index_bits), config.wgt_index_bits
    return Field("dst", 0, 0, acc), Field("src", 0, acc, src), Field("wgt", 0, acc + src, wgt)


def encode_uops(uops: NDArray[Any], config: VtaConfig) -> NDArray[np.uint32]:
    """Micro-ops in 32 bits each.

    Parameters
    ----------
    uops : int[n, 3]
        dst, src, wgt: tile indices. src is an input tile (GEMM) or an accumulator tile (ALU).
    config : VtaConfig
        Its buffer depths are the field widths.

    Returns
    -------
    uint32[n]

    Raises
    ------
    CompileError
        An index does not fit its field, or the array has another shape or type.
    """
    uops = np.asarray(uops)
    if uops.ndim != 2 or uops.shape[1] != 3 or (uops.size and uops.dtype.kind not in "iu"):
        raise CompileError(f"expected integers [n, 3], got {uops.dtype}{list(uops.shape)}", where="micro-ops")
    words = np.zeros(len(uops), np.uint32)
    for column, field in enumerate(_uop_fields(config)):
        values = uops[:, column]
        wrong = np.flatnonzero((values < 0) | (values > field.high))
        if wrong.size:
            message = f"{field.name} is {values[wrong[0]]}, allowed: 0..{field.high} ({field.bits} bits)"
            raise CompileError(message, where=f"micro-op {wrong[0]}")
        words |= values.astype(np.uint32) << np.uint32(field.shift)
    return words


def decode_uops(words: NDArray[np.uint32], config: VtaConfig) -> NDArray[np.int64]:
    """Tile indices int64[n, 3] (dst, src, wgt) of encoded micro-ops uint32[n]; unused high bits are ignored."""
    words = np.asarray(words, np.uint32)
    columns = [(words >> np.uint32(field.shift)) & np.uint32(field.mask) for field in _uop_fields(config)]
    return np.stack(columns, axis=-1).astype(np.int64)
