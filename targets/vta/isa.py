"""The instruction set in one place: values, 128-bit encoding of both versions, and assembly text.

`instructions` has the values, `encoding` the bits, `assembly` the text; everything else imports them from here.
"""

from __future__ import annotations

from lpsn_tvm.targets.vta.assembly import assemble, assemble_program, disassemble
from lpsn_tvm.targets.vta.encoding import INSTRUCTION_BYTES, decode, decode_uops, encode, encode_uops
from lpsn_tvm.targets.vta.instructions import (
    Alu,
    AluKind,
    Finish,
    Flags,
    Gemm,
    Instruction,
    Load,
    Memory,
    Store,
)

__all__ = [
    "INSTRUCTION_BYTES",
    "Alu",
    "AluKind",
    "Finish",
    "Flags",
    "Gemm",
    "Instruction",
    "Load",
    "Memory",
    "Store",
    "assemble",
    "assemble_program",
    "decode",
    "decode_uops",
    "disassemble",
    "encode",
    "encode_uops",
]
