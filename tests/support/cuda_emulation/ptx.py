"""PTX inside inline assembly -> C++ statements on the emulation's functions.

Only instructions that are listed here are known; any other one raises, so that a kernel is never run with an
instruction left out. Operands are the C++ expressions that `translate.py` made of the assembly operands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass


class UnknownInstructionError(Exception):
    """Inline assembly that the emulation does not know."""


Handler = Callable[["re.Match[str]", Sequence[str]], str]
_HANDLERS: list[tuple[re.Pattern[str], Handler]] = []


def _instruction(pattern: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        _HANDLERS.append((re.compile(pattern), handler))
        return handler

    return register


def _members(group: str) -> list[str]:
    """Operands in `{a, b}`; a single operand is a group of one."""
    return [part.strip() for part in group.strip("{}").split(",")]


def _pointer(address: str, space: str) -> str:
    """`[a+16]` in a state space ("shared", or "" for global and generic addresses)."""
    base, _, offset = address.strip("[] ").partition("+")
    value = f"({base.strip()}) + {offset.strip() or 0}"
    return f"emu::shared_pointer(uint32_t({value}))" if space else f"reinterpret_cast<char*>(uint64_t({value}))"


def _into(targets: Sequence[str], array: str) -> str:
    return "".join(f" {target} = {array}[{i}];" for i, target in enumerate(targets) if target != "_")


def _array(name: str, values: Sequence[str]) -> str:
    return f"const uint32_t {name}[] = {{{', '.join(f'uint32_t({value})' for value in values)}}};"


# Shape and width in bits -> registers of a, b, c and d. PTX ISA, "mma", integer types.
_MMA_REGISTERS = {
    ("m8n8k16", 8): (1, 1, 2), ("m16n8k16", 8): (2, 1, 4), ("m16n8k32", 8): (4, 2, 4),
    ("m8n8k32", 4): (1, 1, 2), ("m16n8k32", 4): (2, 1, 4), ("m16n8k64", 4): (4, 2, 4),
}  # fmt: skip


@_instruction(r"mma\.sync\.aligned\.m(\d+)n(\d+)k(\d+)\.row\.col(\.satfinite)?\.s32\.([su])([48])\.([su])([48])\.s32")
def _mma(match: re.Match[str], operands: Sequence[str]) -> str:
    m, n, k, saturate, a_sign, bits, b_sign, b_bits = match.groups()
    registers = _MMA_REGISTERS.get((f"m{m}n{n}k{k}", int(bits)))
    groups = [_members(operand) for operand in operands]
    if bits != b_bits or registers is None:
        raise UnknownInstructionError(f"{match[0]}: no such shape for these types")
    if [len(group) for group in groups] != [registers[2], *registers]:
        raise UnknownInstructionError(f"{match[0]}: wrong number of registers")
    shape = f"{{{m}, {n}, {k}, {bits}, {int(a_sign == 's')}, {int(b_sign == 's')}, {int(saturate is not None)}}}"
    inputs = " ".join(_array(name, group) for name, group in zip("abc", groups[1:], strict=True))
    return f"{inputs} uint32_t d[{registers[2]}]; emu::mma({shape}, d, a, b, c);" + _into(groups[0], "d")


@_instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?(\.shared(?:::cta)?)?\.b16")
def _ldmatrix(match: re.Match[str], operands: Sequence[str]) -> str:
    targets = _members(operands[0])
    if len(targets) != int(match[1]):
        raise UnknownInstructionError(f"{match[0]}: {len(targets)} registers")
    pointer = _pointer(operands[1], match[3] or "")
    call = f"emu::ldmatrix({match[1]}, {'true' if match[2] else 'false'}, d, {pointer});"
    return f"uint32_t d[{match[1]}]; {call}" + _into(targets, "d")


@_instruction(r"cp\.async\.(ca|cg)\.shared(?:::cta)?\.global((?:\.L2::\w+)*)")
def _cp_async(match: re.Match[str], operands: Sequence[str]) -> str:
    operands = list(operands)
    if "cache_hint" in match[2]:
        operands.pop()
    target, source, size = _pointer(operands[0], "shared"), _pointer(operands[1], ""), operands[2]
    if match[1] == "cg" and size.isdigit() and size != "16":
        raise UnknownInstructionError(f"{match[0]}: .cg copies 16 bytes, not {size}")
    read = operands[3] if len(operands) > 3 else size
    if read.startswith("ptx_"):  # a predicate register: ignore-src
        read = f"({read} ? 0 : {size})"
    return f"emu::cp_async({target}, {source}, {size}, {read});"


@_instruction(r"cp\.async\.(commit_group|wait_all)")
def _cp_async_group(match: re.Match[str], _: Sequence[str]) -> str:
    return "emu::cp_async_commit();" if match[1] == "commit_group" else "emu::cp_async_wait_all();"


@_instruction(r"cp\.async\.wait_group")
def _cp_async_wait(_: re.Match[str], operands: Sequence[str]) -> str:
    return f"emu::cp_async_wait({operands[0]});"


@_instruction(r"cvta\.to\.shared\.u64")
def _to_shared(_: re.Match[str], operands: Sequence[str]) -> str:
    return f"{operands[0]} = emu::shared_address(reinterpret_cast<void*>({operands[1]}));"


@_instruction(r"cvta\.to\.global\.u64|cvt\.(u32\.u64|u64\.u32|s64\.s32)|mov\.[bsu](16|32|64)")
def _move(_: re.Match[str], operands: Sequence[str]) -> str:
    source = "emu::lane_id()" if operands[1] == "ptx_laneid" else operands[1]
    return f"{operands[0]} = {source};"


_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">",
            "hs": ">="}  # fmt: skip


@_instruction(r"setp\.(eq|ne|lt|le|gt|ge|lo|ls|hi|hs)\.([bsu])32")
def _setp(match: re.Match[str], operands: Sequence[str]) -> str:
    kind = "int32_t" if match[2] == "s" else "uint32_t"
    return f"{operands[0]} = {kind}({operands[1]}) {_COMPARE[match[1]]} {kind}({operands[2]});"


@_instruction(r"dp4a\.([su])32\.([su])32")
def _dp4a(match: re.Match[str], operands: Sequence[str]) -> str:
    signs = ", ".join("true" if sign == "s" else "false" for sign in match.groups())
    return f"{operands[0]} = emu::dp4a<{signs}>({operands[1]}, {operands[2]}, {operands[3]});"


@_instruction(r"(?:bar|barrier)\.sync(?:\.aligned)?")
def _bar_sync(_: re.Match[str], operands: Sequence[str]) -> str:
    return f"emu::syncthreads_named({operands[0]}, {operands[1] if len(operands) > 1 else 0});"


@_instruction(r"bar\.warp\.sync")
def _bar_warp(_: re.Match[str], operands: Sequence[str]) -> str:
    return f"emu::syncwarp({operands[0]});"


@_instruction(r"lop3\.b32")
def _lop3(_: re.Match[str], operands: Sequence[str]) -> str:
    return f"{operands[0]} = emu::lop3({', '.join(operands[1:])});"


@_instruction(r"prmt\.b32")
def _prmt(_: re.Match[str], operands: Sequence[str]) -> str:
    return f"{operands[0]} = __byte_perm({', '.join(operands[1:])});"


@_instruction(r"bfe\.([su])32")
def _bfe(match: re.Match[str], operands: Sequence[str]) -> str:
    return f"{operands[0]} = emu::bfe<{'true' if match[1] == 's' else 'false'}>({', '.join(operands[1:])});"


@_instruction(r"cvt\.pack\.sat\.([su])(8|16)\.s32(\.b32)?")
def _cvt_pack(match: re.Match[str], operands: Sequence[str]) -> str:
    kind = f"{'' if match[1] == 's' else 'u'}int{match[2]}_t"
    third = operands[3] if match[3] else "0"
    return f"{operands[0]} = emu::cvt_pack<{kind}>({operands[1]}, {operands[2]}, {third});"


@_instruction(
    r"(ld|st)(?:\.volatile|\.weak)?(\.shared(?:::cta)?|\.global)((?:\.nc|\.ca|\.cg|\.cs|\.L[12]::\w+)*)(?:\.v([24]))?\.[bsuf]32"
)
def _load_store(match: re.Match[str], operands: Sequence[str]) -> str:
    store, count = match[1] == "st", int(match[4] or 1)
    address, values = (operands[0], operands[1]) if store else (operands[1], operands[0])
    pointer = _pointer(address, "shared" if "shared" in match[2] else "")
    registers = _members(values)
    if len(registers) != count or "cache_hint" in match[3]:
        raise UnknownInstructionError(f"{match[0]}: {len(registers)} registers")
    access = f"void* const p = {pointer}; emu::access(p, {4 * count}, emu::{'kWrite' if store else 'kRead'});"
    if store:
        return f"{access} {_array('v', registers)} std::memcpy(p, v, sizeof v);"
    return f"{access} uint32_t v[{count}]; std::memcpy(v, p, sizeof v);" + _into(registers, "v")


@_instruction(r"(?:fence|membar|prefetch\w*|griddepcontrol)[\w.:]*")
def _nothing(_: re.Match[str], __: Sequence[str]) -> str:
    """No effect on results where blocks run one after the other and threads never run at the same time."""
    return ";"


_REGISTER_TYPES = {"pred": "bool", "b16": "uint16_t", "b32": "uint32_t", "u32": "uint32_t", "s32": "uint32_t",
                   "b64": "uint64_t", "u64": "uint64_t", "s64": "uint64_t"}  # fmt: skip


@dataclass(frozen=True)
class _Statement:
    guard: str
    opcode: str
    operands: list[str]


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets and braces."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[{(") - (char in "]})")
        if char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def _operand(text: str) -> str:
    """`%3` -> `emu_o3`; other names are registers of the assembly block."""
    text = re.sub(r"%%(\w)", r"\1", text)
    text = re.sub(r"%(\d+)", r"emu_o\1", text)
    text = re.sub(r"%([A-Za-z_]\w*)", r"\1", text)
    return re.sub(r"(?<![\w.])(?!emu_o\d+\b|_(?!\w)|0x)([A-Za-z_]\w*)", r"ptx_\1", text)


def _parse(statement: str) -> _Statement:
    match = re.fullmatch(r"(?:@(!?)%{0,2}(\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.DOTALL)
    if match is None:
        raise UnknownInstructionError(f"cannot read the statement {statement!r}")
    guard = f"if ({match[1]}ptx_{match[2]}) " if match[2] else ""
    return _Statement(guard, match[3], [_operand(part) for part in _split(match[4])])


def _registers(statement: str) -> str:
    match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.+)", statement, re.DOTALL)
    if match is None or match[1] not in _REGISTER_TYPES or "<" in match[2]:
        raise UnknownInstructionError(f"cannot read the declaration {statement!r}")
    names = ", ".join(f"{_operand(name)} = 0" for name in _split(match[2]))
    return f"{_REGISTER_TYPES[match[1]]} {names};"


def statements_to_cpp(text: str) -> str:
    """C++ for the text of one assembly block.

    Raises
    ------
    UnknownInstructionError
        An instruction or declaration is not in the tables above.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    out = []
    rest = text.strip()
    while rest:
        if rest[0] in "{}":  # a scope: braces of operands never start a statement
            out.append(rest[0])
            rest = rest[1:].strip()
            continue
        statement, _, rest = rest.partition(";")
        statement, rest = statement.strip(), rest.strip()
        if statement.startswith(".reg"):
            out.append(_registers(statement))
        elif statement:
            out.append(_instruction_to_cpp(_parse(statement)))
    return "\n".join(out)


def _instruction_to_cpp(statement: _Statement) -> str:
    for pattern, handler in _HANDLERS:
        match = pattern.fullmatch(statement.opcode)
        if match is not None:
            return f"{statement.guard}{{ {handler(match, statement.operands)} }}"
    raise UnknownInstructionError(f"the emulation does not know {statement.opcode}")
