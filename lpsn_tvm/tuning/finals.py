"""Which of the fastest trials really is faster: compared in turn with the default, or nothing changes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from lpsn_tvm.records import Record
from lpsn_tvm.schedules.template import Config, canonical
from lpsn_tvm.tuning.measurer import Comparison, Measurer
from lpsn_tvm.tuning.tasks import Task
from lpsn_tvm.tuning.trials import Trial

FINALISTS = 4
ROUNDS = 15
MARGIN = 0.03
"""A configuration replaces the default where its median is at least this much faster ..."""
WINS = 0.75
"""... and it was faster in this share of the rounds."""


@dataclass(frozen=True)
class Verdict:
    """What came of one task's finals.

    Parameters
    ----------
    winner : Config or None
        None: the default stays.
    seconds, default_seconds : float
        Medians of the comparison, of the winner (or the default) and the default; infinite where there was none.
    """

    winner: Config | None
    seconds: float
    default_seconds: float


def finals(task: Task, best: Sequence[Trial], measurer: Measurer) -> Verdict:
    """Compare the fastest trials of a task with its default configuration.

    A configuration whose output is not the default's bit for bit is dropped with a warning.
    """
    default = task.template.default
    others: list[Config] = [t.config for t in best if canonical(t.config) != canonical(default)][:FINALISTS]
    if not others:
        return Verdict(None, float("inf"), float("inf"))
    comparison = measurer.compare(task.template, [default, *others], ROUNDS)
    for index, config in enumerate(others, 1):
        if comparison.seconds[0] and comparison.seconds[index] and not comparison.is_equal[index]:
            warnings.warn(
                f"{task.template.name} computes something else than its default with {canonical(config)} "
                f"({task.nodes[0]}); it is not used",
                stacklevel=2,
            )
    winners = [index for index in range(1, len(others) + 1) if is_clearly_faster(comparison, index)]
    base = comparison.median(0)
    if not winners:
        return Verdict(None, base, base)
    winner = min(winners, key=comparison.ratio)
    return Verdict(others[winner - 1], comparison.median(winner), base)


def is_clearly_faster(comparison: Comparison, index: int) -> bool:
    """Whether a configuration with equal output beats the first one by the margin, and in most rounds."""
    own, first = comparison.seconds[index], comparison.seconds[0]
    if not own or not first or not comparison.is_equal[index]:
        return False
    wins = sum(a < b for a, b in zip(own, first, strict=True)) / len(own)
    return comparison.median(index) <= (1 - MARGIN) * comparison.median(0) and wins >= WINS


def record_of(task: Task, device: str, verdict: Verdict, machine: str) -> Record | None:
    """The record of a verdict; None where the default stays."""
    if verdict.winner is None:
        return None
    return Record(
        device=device,
        template=task.template.name,
        workload=task.template.workload,
        config=dict(verdict.winner),
        seconds=verdict.seconds,
        default_seconds=verdict.default_seconds,
        machine=machine,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
