"""Control flow of machine code: which instructions of whole warps stand under a condition.

The emulation cannot see this: it runs threads one after another and lets lanes meet wherever they come from. A GPU
executes `mma.sync`, `ldmatrix`, shuffles and barriers once for all lanes; where some took another branch, the result
is undefined.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

WARP_WIDE = ("IMMA", "HMMA", "LDSM", "MOVM", "SHFL", "VOTE", "MATCH", "BAR", "WARPSYNC")
"""Opcodes that all lanes of a warp execute together."""
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_END = ("EXIT", "RET", "KILL", "BPT")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its predicate ("" for none), full opcode and operands."""

    guard: str
    opcode: str
    operands: str

    @property
    def kind(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class _Block:
    """Instructions that run one after another, and the blocks that can follow; the block after the last is the end of
    the thread.
    """

    instructions: Sequence[Instruction]
    following: Sequence[int]


def conditional(listing: str) -> list[str]:
    """The warp-wide instructions of one kernel that some threads may skip, and why.

    Loops are no condition: that their number of steps is the same for all threads is not checked.

    Parameters
    ----------
    listing : str
        What `nvdisasm -c` prints for the kernel.
    """
    blocks = _blocks(listing)
    following = [*(block.following for block in blocks), ()]
    coming = [[b for b, block in enumerate(blocks) if c in block.following] for c in range(len(following))]
    behind, before = _on_every_way(following, len(blocks)), _on_every_way(coming, 0)
    found = []
    for b, block in enumerate(blocks):
        names = [i.opcode for i in block.instructions if i.kind in WARP_WIDE]
        found += [f"@{i.guard} {i.opcode}" for i in block.instructions if i.kind in WARP_WIDE and i.guard]
        for c, chooser in enumerate(blocks if names else ()):
            decides = any(behind[f] >> b & 1 for f in chooser.following) and not (behind[c] >> b & 1 and b != c)
            # Who comes from there decides about another time only.
            if decides and not before[c] >> b & 1:
                last = chooser.instructions[-1]
                found.append(f"{names[0]} behind @{last.guard} {last.opcode} {last.operands}")
    return found


def _blocks(listing: str) -> list[_Block]:
    instructions, labels = _parse(listing)
    end = len(instructions)
    following = [_following(i, instruction, labels, end) for i, instruction in enumerate(instructions)]
    heads = {0, end, *(place for place in labels.values() if place <= end)}
    for i, places in enumerate(following):
        if places != [i + 1]:
            heads.update(place for place in (*places, i + 1) if place <= end)
    order = sorted(heads)
    index = {head: n for n, head in enumerate(order)}
    return [
        _Block(instructions[first:last], [index[place] for place in following[last - 1]])
        for first, last in pairwise(order)
    ]


def _parse(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := _INSTRUCTION.match(line):
            instructions.append(Instruction(match[1] or "", match[2], match[3]))
    return instructions, labels


def _following(place: int, instruction: Instruction, labels: dict[str, int], end: int) -> list[int]:
    """Where a thread can go from an instruction; `end` is behind the last one."""
    if instruction.kind in _END:
        places = [end]
    elif instruction.kind == "BRA" or (instruction.kind == "CALL" and ".L_x_" in instruction.operands):
        # The compiler leaves a loop by a call, too, that never returns.
        target = re.search(r"\.L_x_\d+", instruction.operands)
        places = [labels[target[0]]] if target else [end]
    else:
        return [place + 1]
    is_choice = bool(instruction.guard) or re.match(r"!?U?P\d", instruction.operands) is not None
    return [*places, place + 1] if is_choice else places


def _on_every_way(neighbours: Sequence[Sequence[int]], goal: int) -> list[int]:
    """For every block the set (bits) of blocks that every way from it to `goal` passes, both included."""
    everything = (1 << len(neighbours)) - 1
    sets = [everything] * len(neighbours)
    sets[goal] = 1 << goal
    changed = True
    while changed:
        changed = False
        for b, others in enumerate(neighbours):
            common = everything
            for other in others:
                common &= sets[other]
            if b != goal and common | 1 << b != sets[b]:
                sets[b], changed = common | 1 << b, True
    return sets
