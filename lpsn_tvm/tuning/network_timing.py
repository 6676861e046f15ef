"""Times of whole networks in turn: in this process, or in a worker process beside the device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lpsn_tvm.artifact import Artifact
from lpsn_tvm.loading import load

ROUNDS = 9
"""Whole networks are timed so often in turn."""
WARMUPS, LEAST, MOST = 3, 3, 15
BURST_SECONDS = 0.5
"""Of the runs of one turn that count, about; a slow device makes fewer of them."""


def files_in_turn(paths: Sequence[str], rounds: int) -> dict[str, list[list[float]]]:
    """`in_turn` of module files, loaded in this process."""
    return {"seconds": in_turn([load(Path(path)) for path in paths], rounds)}


def in_turn(modules: Sequence[Artifact], rounds: int = ROUNDS) -> list[list[float]]:
    """Seconds of one run of each module, one value (the median of some runs) per round; every round starts with another
    one, so that what drifts, such as a clock, meets all of them.
    """
    repeats = [_repeats(module) for module in modules]
    seconds: list[list[float]] = [[] for _ in modules]
    for turn in range(rounds):
        for step in range(len(modules)):
            index = (turn + step) % len(modules)
            milliseconds = modules[index].benchmark(repeats=repeats[index], warmup=WARMUPS)
            seconds[index].append(milliseconds / 1e3)
    return seconds


def _repeats(module: Artifact) -> int:
    module.prepare()
    milliseconds = module.benchmark(repeats=1, warmup=1)
    return max(LEAST, min(MOST, int(BURST_SECONDS * 1e3 / max(milliseconds, 1e-6))))
