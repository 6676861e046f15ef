"""CUDA source -> C++ for the host: inline assembly becomes calls, dynamic shared memory a pointer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cuda_emulation.ptx import UnknownInstructionError, statements_to_cpp

_ASM = re.compile(r"\b(?:__asm__|__asm|asm)\b\s*(?:__volatile__|volatile)?\s*\(")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_DYNAMIC = re.compile(
    r"extern\s+__shared__\s+((?:__align__|alignas)\s*\(\s*\d+\s*\)\s+)?([\w:\s]+?)\s+(\w+)\s*\[\s*\]\s*;"
)
_KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\s*\(([^)]*)\)\s*)?(\w+)\s*\(")
_BITS = {"r": 32, "f": 32, "l": 64, "d": 64, "h": 16}


@dataclass(frozen=True)
class _Operand:
    """One operand of an assembly block: what the template calls it, its constraint, its C++ expression."""

    name: str
    constraint: str
    expression: str

    @property
    def is_output(self) -> bool:
        return self.constraint[0] in "=+"

    def enter(self, index: int) -> str:
        """Declare `emu_o<index>` with the operand's bits."""
        letter = self.constraint.lstrip("=+&")
        if letter == "n":
            return f"const long emu_o{index} = {self.expression};"
        if letter not in _BITS:
            raise UnknownInstructionError(f"assembly constraint {self.constraint!r}")
        register = f"uint{_BITS[letter]}_t"
        if not self.is_output:
            return f"const {register} emu_o{index} = emu::raw<{register}>({self.expression});"
        start = f"emu::raw<{register}>(emu_l{index})" if self.constraint[0] == "+" else "0"
        return f"auto& emu_l{index} = {self.expression}; {register} emu_o{index} = {start};"

    def leave(self, index: int) -> str:
        return f"emu::put(emu_l{index}, emu_o{index});" if self.is_output else ""


def _closing(text: str, start: int) -> int:
    """Position of the parenthesis that closes the one before `start`; strings are skipped."""
    depth, i = 1, start
    while i < len(text):
        if text[i] == '"':
            i = _STRING.match(text, i).end()  # type: ignore[union-attr]
            continue
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
        i += 1
    raise UnknownInstructionError("an assembly block is not closed")


def _sections(text: str) -> list[str]:
    """Template, outputs, inputs, clobbers: split at the colons outside of parentheses and strings."""
    parts, start, i = [], 0, 0
    while i < len(text):
        if text[i] == '"':
            i = _STRING.match(text, i).end()  # type: ignore[union-attr]
        elif text[i] == "(":
            i = _closing(text, i + 1) + 1
        else:
            if text[i] == ":":
                parts.append(text[start:i])
                start = i + 1
            i += 1
    return [*parts, text[start:]]


def _operands(section: str) -> list[_Operand]:
    found, position = [], 0
    pattern = re.compile(r'\s*,?\s*(?:\[(\w+)\]\s*)?"([^"]+)"\s*\(')
    while (match := pattern.match(section, position)) is not None:
        end = _closing(section, match.end())
        found.append(_Operand(match[1] or "", match[2], section[match.end() : end].strip()))
        position = end + 1
    if section[position:].strip():
        raise UnknownInstructionError(f"cannot read the assembly operands {section.strip()!r}")
    return found


def _template(section: str) -> str:
    literals = [literal[1:-1] for literal in _STRING.findall(section)]
    escapes = {"\\n": "\n", "\\t": "\t", "\\r": "\r", '\\"': '"', "\\\\": "\\"}
    return re.sub(r'\\[ntr"\\]', lambda match: escapes[match[0]], "".join(literals))


def _block(text: str) -> str:
    """The inside of `asm(...)` -> a C++ block."""
    sections = [*_sections(text), "", ""]
    operands = _operands(sections[1]) + _operands(sections[2])
    template = _template(sections[0])
    for index, operand in enumerate(operands):
        if operand.name:
            template = template.replace(f"%[{operand.name}]", f"%{index}")
    enter = [operand.enter(index) for index, operand in enumerate(operands)]
    leave = [operand.leave(index) for index, operand in enumerate(operands)]
    return "\n".join(["do {", *enter, statements_to_cpp(template), *leave, "} while (false)"])


def translate(source: str) -> str:
    """C++ of a CUDA source.

    Raises
    ------
    UnknownInstructionError
        An assembly block holds something that the emulation does not know.
    """
    out, position = [], 0
    for match in _ASM.finditer(source):
        if match.start() < position or _in_line_comment(source, match.start()):
            continue
        end = _closing(source, match.end())
        out += [source[position : match.start()], _block(source[match.end() : end])]
        position = end + 1
    translated = "".join([*out, source[position:]])
    translated = _DYNAMIC.sub(r"\2* const \3 = static_cast<\2*>(emu::dynamic_shared());", translated)
    if re.search(r"extern\s+(\"C\"\s+)?__shared__", translated):
        raise UnknownInstructionError("cannot read a declaration of dynamic shared memory")
    return re.sub(r"\bstatic\s+__shared__\b|\b__shared__\s+static\b", "__shared__", translated)


def _in_line_comment(source: str, position: int) -> bool:
    return "//" in source[source.rfind("\n", 0, position) + 1 : position]


@dataclass(frozen=True)
class Signature:
    """What a `__global__` function says about itself: threads that `__launch_bounds__` allows (None: no bound), and the
    names of its parameters.
    """

    max_threads: int | None
    parameters: tuple[str, ...]


def kernels(source: str) -> dict[str, Signature]:
    """The `__global__` functions by name."""
    found: dict[str, Signature] = {}
    for match in _KERNEL.finditer(source):
        bound = match[1].split(",")[0].strip() if match[1] else ""
        parameters = source[match.end() : _closing(source, match.end())]
        names = tuple(re.findall(r"(\w+)\s*(?:,|$)", parameters.strip()))
        known = found.get(match[2])
        limit = int(bound) if bound.isdigit() else known.max_threads if known else None
        found[match[2]] = Signature(limit, names)
    return found
