"""What is wrong, told so that the cause can be guessed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

_FINDING = re.compile(r"^=+ (Invalid|Error: |Warning: Race|Uninit|Barrier|Program hit|.*hazard at)")


def pattern(wrong: Any) -> str:
    """Where the wrong elements lie: which samples, channels (by 32 and within a block), rows and columns.

    Parameters
    ----------
    wrong : bool[N, C, ...]
    """
    names = ("samples", "channels", "rows", "columns")[: wrong.ndim]
    if wrong.ndim < 2:
        return f"{int(wrong.sum())} elements"
    told = [_part(name, wrong, axis) for axis, name in enumerate(names)]
    lanes = sorted({int(channel) % 32 for channel in np.flatnonzero(wrong.any(axis=_others(wrong, 1)))})
    told.append("every lane of 32 channels" if len(lanes) == min(32, wrong.shape[1]) else f"lanes {_listed(lanes)}")
    return "wrong are " + ", ".join(told)


def _others(array: Any, axis: int) -> tuple[int, ...]:
    return tuple(other for other in range(array.ndim) if other != axis)


def _part(name: str, wrong: Any, axis: int) -> str:
    found = np.flatnonzero(wrong.any(axis=_others(wrong, axis))).tolist()
    return f"all {name}" if len(found) == wrong.shape[axis] else f"{name} {_listed(found)} of {wrong.shape[axis]}"


def _listed(numbers: list[int]) -> str:
    """Ranges: 0-3, 8, 12-15."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    told = [f"{low}-{high}" if high > low else str(low) for low, high in ranges]
    return ", ".join(told[:8]) + (", ..." if len(told) > 8 else "")


def sanitizer_errors(folder: Path) -> list[str]:
    """Findings of compute-sanitizer, each with the lines that say where; else its own summary, if not of 0 errors.

    Parameters
    ----------
    folder : Path
        Where its logs are, one per process.
    """
    logs = sorted(folder.glob("log*"))
    if not logs:
        return ["compute-sanitizer left no log"]
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    found = ["\n  ".join(lines[i : i + 4]) for i, line in enumerate(lines) if _FINDING.match(line)]
    summaries = [line for line in lines if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
    bad = [line for line in summaries if re.search(r"SUMMARY: (?!0 )", line)]
    return found[:10] or bad
