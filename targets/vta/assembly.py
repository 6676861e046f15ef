"""One line of text per instruction, and back.

    load.wgt sram=0 addr=0x140000 rows=1 columns=9 stride=9 | pop_next push_next
    load.inp sram=16 addr=0x180000 rows=8 columns=14 stride=14 pad_y=1,0 pad_x=1,1
    gemm reset uops=0:4 loops=14x1
    alu.max uops=0:1 loops=1x784 dst=0,1 src=0,1 imm=-128
    nop.inp | push_next
    finish

`addr` is the byte address of the first tile; what is zero is left out; token flags follow the bar.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from lpsn_tvm.errors import CompileError
from lpsn_tvm.targets.vta.config import VtaConfig
from lpsn_tvm.targets.vta.encoding import ALU_OPERATIONS, MEMORY_IDS, encode
from lpsn_tvm.targets.vta.instructions import Alu, Finish, Flags, Gemm, Instruction, Load, Store

_FLAGS = tuple(field.name for field in fields(Flags))
_MNEMONICS = (
    *(f"load.{memory}" for memory in MEMORY_IDS),
    *(f"nop.{memory}" for memory in MEMORY_IDS),
    "store",
    "nop.out",
    "gemm",
    *(f"alu.{op}" for op in ALU_OPERATIONS),
    "finish",
)
# Operands of each form -> the instruction fields they set, and what separates those.
_Operands = dict[str, tuple[tuple[str, ...], str]]
_TRANSFER: _Operands = {
    "sram": (("sram",), ""),
    "addr": (("dram",), ""),
    "rows": (("y_size",), ""),
    "columns": (("x_size",), ""),
    "stride": (("x_stride",), ""),
}
_PADS: _Operands = {"pad_y": (("y_pad_0", "y_pad_1"), ","), "pad_x": (("x_pad_0", "x_pad_1"), ",")}
_LOOPS: _Operands = {
    "uops": (("uop_begin", "uop_end"), ":"),
    "loops": (("iter_out", "iter_in"), "x"),
    "dst": (("dst_out", "dst_in"), ","),
    "src": (("src_out", "src_in"), ","),
}
_OPERANDS: dict[type[Any], _Operands] = {
    Load: _TRANSFER | _PADS,
    Store: _TRANSFER,
    Gemm: _LOOPS | {"wgt": (("wgt_out", "wgt_in"), ",")},
    Alu: _LOOPS | {"imm": (("imm",), "")},
    Finish: {},
}
_ALWAYS = ("sram", "addr", "rows", "columns", "uops", "loops")


def disassemble(instruction: Instruction, config: VtaConfig) -> str:
    """The instruction as one line; `assemble` gives it back."""
    words = [_mnemonic(instruction)]
    is_nop = words[0].startswith("nop.")
    if isinstance(instruction, Gemm) and instruction.reset:
        words.append("reset")
    for word, (names, separator) in _OPERANDS[type(instruction)].items():
        values = [getattr(instruction, name) for name in names]
        immediate = word == "imm" and bool(getattr(instruction, "use_imm", False))
        if is_nop or not (any(values) or word in _ALWAYS or immediate):
            continue
        if word == "addr":
            words.append(f"addr=0x{values[0] * _tile_bytes(instruction, config):x}")
        elif word == "imm" and not immediate:
            words.append(f"unused_imm={values[0]}")
        else:
            words.append(f"{word}={separator.join(str(int(value)) for value in values)}")
    flags = [flag for flag in _FLAGS if getattr(instruction, flag)]
    return " ".join([*words, "|", *flags] if flags else words)


def _mnemonic(instruction: Instruction) -> str:
    if isinstance(instruction, (Load, Store)):
        memory = instruction.memory if isinstance(instruction, Load) else "out"
        names = [name for operand, _ in _OPERANDS[type(instruction)].values() for name in operand]
        if not any(getattr(instruction, name) for name in names):
            return f"nop.{memory}"
        return f"load.{memory}" if isinstance(instruction, Load) else "store"
    if isinstance(instruction, Alu):
        return f"alu.{instruction.op}"
    return "gemm" if isinstance(instruction, Gemm) else "finish"


def _tile_bytes(instruction: Instruction, config: VtaConfig) -> int:
    """Bytes per unit of `dram`."""
    memory = instruction.memory if isinstance(instruction, Load) else "out"
    return int(getattr(config, f"{memory}_tile_bytes"))


def assemble(text: str, config: VtaConfig) -> Instruction:
    """The instruction that one line of assembly means.

    Raises
    ------
    CompileError
        The line has an unknown mnemonic, operand or flag, or a value that cannot be encoded.
    """
    operands, _, flags = text.partition("|")
    head, *words = operands.split() or [""]
    if head not in _MNEMONICS:
        raise CompileError(f"unknown mnemonic {head!r}; known: {', '.join(_MNEMONICS)}", where=repr(text))
    instruction = _new(head)
    for word in words:
        _set(instruction, word, text, config)
    for flag in flags.split():
        if flag not in _FLAGS:
            raise CompileError(f"unknown flag {flag!r}; known: {', '.join(_FLAGS)}", where=repr(text))
        setattr(instruction, flag, True)
    try:
        encode([instruction], config)
    except CompileError as error:
        raise CompileError(str(error).removeprefix("instruction 0: "), where=repr(text)) from error
    return instruction


def assemble_program(text: str, config: VtaConfig) -> list[Instruction]:
    """The instructions of several lines; `#` starts a comment, empty lines do not count.

    Raises
    ------
    CompileError
        As `assemble`.
    """
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [assemble(line, config) for line in lines if line]


def _new(mnemonic: str) -> Instruction:
    """The instruction of a mnemonic with default operands."""
    head, _, suffix = mnemonic.partition(".")
    if head == "gemm":
        return Gemm()
    if head == "finish":
        return Finish()
    if head == "alu":
        return Alu(op=suffix)  # type: ignore[arg-type]  # known mnemonic
    if head == "store" or suffix == "out":
        return Store()
    return Load(memory=suffix)  # type: ignore[arg-type]  # known mnemonic


def _set(instruction: Instruction, word: str, text: str, config: VtaConfig) -> None:
    """Apply one operand."""
    kind = type(instruction)
    name, _, value = word.partition("=")
    if isinstance(instruction, Gemm) and word == "reset":
        instruction.reset = True
        return
    uses = name == "imm"
    name = "imm" if kind is Alu and name == "unused_imm" else name
    if name not in _OPERANDS[kind]:
        known = ", ".join((*_OPERANDS[kind], *(["reset"] if kind is Gemm else []))) or "none"
        raise CompileError(f"unknown operand {word!r}; known: {known}", where=repr(text))
    names, separator = _OPERANDS[kind][name]
    parts = value.split(separator) if separator else [value]
    number = r"0x[0-9a-f]+" if name == "addr" else r"-?[0-9]+"
    if len(parts) != len(names) or not all(re.fullmatch(number, part, re.ASCII) for part in parts):
        form = separator.join("N" for _ in names) if name != "addr" else "0xN"
        raise CompileError(f"expected {name}={form}, got {word!r}", where=repr(text))
    values = [int(part, 0 if name == "addr" else 10) for part in parts]
    if name == "addr":
        size = _tile_bytes(instruction, config)
        if values[0] % size:
            raise CompileError(f"addr is no multiple of the {size}-byte tile", where=repr(text))
        values[0] //= size
    for field, number_value in zip(names, values, strict=True):
        setattr(instruction, field, number_value)
    if isinstance(instruction, Alu) and uses:
        instruction.use_imm = True
