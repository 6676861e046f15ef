"""The paper's claim on a user's own model: how much the ranking of a layer's channels depends on how sparse the
layers before it are.

For every group the importances on the dense network (one-shot) are compared with those on the already pruned prefix
(greedy): Kendall's tau of the scores and the Levenshtein distance of the two orders, at several sparsities.

Source: Zhang, Colbert, Das, "Learning Low-Precision Structured Subnetworks Using Joint Layerwise Channel Pruning and
Uniform Quantization",
Applied Sciences 2022, 12(15), 7829 (the comparison of rankings at sparsities 0.25, 0.5 and 0.75).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from lpsn_tvm.calibration import CalibrationSet
from lpsn_tvm.passes.prune import prune


@dataclass(frozen=True)
class RankingChange:
    """How the ranking of one group changes when the layers before it are pruned.

    Parameters
    ----------
    name : str
        Group.
    channels : int
    sparsity : float
    tau : float
        Kendall's tau-b of the two importances: 1 is the same order, 0 unrelated; nan if one of them is constant.
    levenshtein : int
        Edits (insert, delete, substitute) between the two orders.
    """

    name: str
    channels: int
    sparsity: float
    tau: float
    levenshtein: int


def kendall_tau(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """Kendall's tau-b of two score vectors."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    left, right = np.sign(a[:, None] - a[None, :]), np.sign(b[:, None] - b[None, :])
    norm = np.sqrt(np.square(left).sum() * np.square(right).sum())
    return float((left * right).sum() / norm) if norm > 0 else float("nan")


def levenshtein(first: Sequence[int], second: Sequence[int]) -> int:
    """Smallest number of insertions, deletions and substitutions that turn one sequence into the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        previous, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (a != b)))
    return row[-1]


def compare_rankings(
    mod: tvm.IRModule,
    calibration: CalibrationSet,
    *,
    sparsities: Sequence[float] = (0.25, 0.5, 0.75),
    score: str = "mean_activation",
    resolve: bool = False,
    **options: Any,
) -> list[RankingChange]:
    """Rank every group's channels one-shot and greedily.

    Parameters
    ----------
    mod : IRModule
        Canonical; not changed.
    calibration : CalibrationSet
        Unlabelled samples.
    sparsities : sequence of float
        Fractions of channels, one comparison each.
    score : str
        "mean_activation" is the paper's; also "zero_fraction".
    resolve : bool
        Re-solve consumers while walking; the paper has nothing of the kind.
    **options
        Of `prune`: ignore, seed, memory_budget, progress.
    """
    changes = []
    for sparsity in sparsities:
        results = {
            order: prune(mod, calibration, sparsity=sparsity, score=score, order=order, resolve=resolve, **options)
            for order in ("one_shot", "greedy")
        }
        dense = {record.name: record.scores for record in results["one_shot"].layers if record.scores is not None}
        for record in results["greedy"].layers:
            if record.scores is None:
                continue
            before, after = dense[record.name], record.scores
            orders = [np.argsort(scores, kind="stable").tolist() for scores in (before, after)]
            changes.append(
                RankingChange(record.name, record.before, sparsity, kendall_tau(before, after), levenshtein(*orders))
            )
    return changes
