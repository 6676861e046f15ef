"""Exact elimination: the order in which units (channels) cost the least output error to remove, everything left
re-fitted.

For consumer p with damped H_p = X^T X and least squares weights W_p, removing column block c and re-fitting the rest
raises the squared error by

    cost_p(c) = tr(W_c^T [(H_p^-1)_cc]^-1 W_c)

The costs of all consumers of a group are summed, each weighted (one over the spread of its target). The cheapest unit
goes, W and H^-1 are downdated (Schur complement), and so on. In wide groups several units go per global update: the
candidates' own blocks of H^-1 and W are all that the exact costs among the candidates need, so duplicates are still
seen; only the other units' costs are one update old.

Source: Hassibi and Stork, "Optimal Brain Surgeon", 1993; Frantar and Alistarh, "Optimal Brain Compression", 2022
(blocks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lpsn_tvm.passes.resolve import SCORE_DAMPING, cholesky, damped_factor, factor_solve, invert_factor

EXACT_WORK = 6e9
"""Up to this many multiply-adds for one-by-one elimination, every unit is its own global update."""
COMPACT_ROWS = 256
"""Rows that are copied at once when removed columns are squeezed out."""
BATCH_FRACTION = 0.02


@dataclass
class Problem:
    """One consumer of the group.

    Parameters
    ----------
    inverse : float64[k, k]
        (X^T X + damping)^-1, bias included; overwritten by the elimination.
    weights : float64[k, outputs]
        Least squares weights; overwritten.
    units : int64[k]
        Unit that each column belongs to, -1 for columns that stay.
    weight : float
        Factor of this consumer's cost in the sum.
    """

    inverse: Tensor
    weights: Tensor
    units: Tensor
    weight: float


@dataclass(frozen=True)
class Elimination:
    """Result: `order` int64[removed] units, cheapest first; `costs` float64[removed] weighted error that each one
    added.
    """

    order: Tensor
    costs: Tensor


def problem_of(
    gram: Tensor, moment: Tensor, prior: Tensor, units: Tensor, weight: float, damping: float = SCORE_DAMPING
) -> Problem:
    """The problem of one (group of a) consumer: its least squares weights and the inverse, from one factorisation.

    Parameters
    ----------
    gram : float64[k, k]
        X^T X, bias column last.
    moment : float64[k, outputs]
        X^T Y.
    prior : float64[k, outputs]
        Weights that the damping pulls towards.
    units : int64[k]
        Unit of every column, -1 for columns that stay.
    weight : float
        Factor of this consumer's cost.
    damping : float
        Relative to the mean of the diagonal.
    """
    factor = damped_factor(gram[None], damping)[0]
    weights = prior + factor_solve(factor, moment - gram @ prior)
    return Problem(invert_factor(factor), weights, units, weight)


def eliminate(problems: Sequence[Problem], units: int, count: int, budget: float | None = None) -> Elimination:
    """Remove `count` of `units` units, cheapest first (`problems` are consumed).

    Parameters
    ----------
    problems : sequence of Problem
        All consumers.
    units, count : int
        Units there are, and units to remove (at most units - 1).
    budget : float, optional
        Stop before the summed weighted costs pass this.
    """
    alive = torch.ones(units, dtype=torch.bool)
    order: list[int] = []
    costs: list[float] = []
    spent = 0.0
    while len(order) < min(count, units - 1):
        wanted = min(_batch(problems, int(alive.sum()), count), count - len(order))
        chosen, added = _choose(problems, alive, wanted)
        for position, cost in enumerate(added):
            if budget is not None and spent + cost > budget:
                return _result(order + chosen[:position], costs + added[:position])
            spent += cost
        order += chosen
        costs += added
        alive[torch.tensor(chosen)] = False
        for problem in problems:
            _downdate(problem, torch.tensor(chosen))
    return _result(order, costs)


def _result(order: list[int], costs: list[float]) -> Elimination:
    return Elimination(torch.tensor(order, dtype=torch.int64), torch.tensor(costs, dtype=torch.float64))


def _batch(problems: Sequence[Problem], alive: int, count: int) -> int:
    """Units per global update: one where that is affordable, else a small fraction of what is left."""
    work = sum(2 * count * p.inverse.shape[0] ** 2 * max(1, len(p.units) // max(1, alive)) for p in problems)
    return 1 if work <= EXACT_WORK else max(1, int(BATCH_FRACTION * alive))


def _choose(problems: Sequence[Problem], alive: Tensor, wanted: int) -> tuple[list[int], list[float]]:
    """The next `wanted` units in exact order among the cheapest candidates, and what each adds."""
    costs = torch.zeros(len(alive), dtype=torch.float64)
    for problem in problems:
        costs += problem.weight * unit_costs(problem, len(alive))
    costs[~alive] = torch.inf
    if wanted == 1:
        best = int(costs.argmin())
        return [best], [max(0.0, float(costs[best]))]
    pool = torch.topk(costs, min(4 * wanted, int(alive.sum())), largest=False).indices
    local = [_restrict(problem, pool) for problem in problems]
    left = torch.ones(len(pool), dtype=torch.bool)
    chosen: list[int] = []
    added: list[float] = []
    for _ in range(wanted):
        one, cost = _choose(local, left, 1)
        left[one] = False
        chosen.append(int(pool[one[0]]))
        added += cost
        for problem in local:
            _downdate(problem, torch.tensor(one))
    return chosen, added


def _restrict(problem: Problem, pool: Tensor) -> Problem:
    """The problem's blocks of the units in `pool`, renumbered by their place in it."""
    numbers = torch.full((int(max(problem.units.max(), pool.max())) + 2,), -1, dtype=torch.int64)
    numbers[pool] = torch.arange(len(pool))
    units = numbers[problem.units]  # unit -1 reads the last entry, which is -1
    columns = (units >= 0).nonzero()[:, 0]
    inverse = problem.inverse.index_select(0, columns).index_select(1, columns)
    return Problem(inverse, problem.weights.index_select(0, columns), units[columns], problem.weight)


def unit_costs(problem: Problem, units: int) -> Tensor:
    """float64[units]: tr(W_c^T [(H^-1)_cc]^-1 W_c) of every unit; 0 for units that this consumer does not read."""
    costs = torch.zeros(units, dtype=torch.float64)
    for members, columns in _blocks(problem.units):
        block = problem.inverse[columns[:, :, None], columns[:, None, :]]
        weights = problem.weights[columns]
        # Small inverses and one product are far faster than a batched solve with many right-hand sides.
        costs[members] = (torch.linalg.inv(block) * torch.bmm(weights, weights.transpose(1, 2))).sum(dim=(1, 2))
    return costs


def _blocks(units: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Units with equally many columns together: (units int64[n], columns int64[n, size])."""
    columns = (units >= 0).nonzero()[:, 0]
    if not len(columns):
        return []
    columns = columns[torch.argsort(units[columns], stable=True)]
    members, sizes = torch.unique_consecutive(units[columns], return_counts=True)
    starts = sizes.cumsum(0) - sizes
    blocks = []
    for size in sizes.unique().tolist():
        same = sizes == size
        blocks.append((members[same], columns[starts[same][:, None] + torch.arange(size)]))
    return blocks


def _downdate(problem: Problem, removed: Tensor) -> None:
    """Remove the units' columns: W and H^-1 of what is left."""
    gone = torch.isin(problem.units, removed)
    columns = gone.nonzero()[:, 0]
    if not len(columns):
        return
    kept = (~gone).nonzero()[:, 0]
    side = problem.inverse[:, columns]
    factor = cholesky(side[columns])
    weights = problem.weights
    weights.sub_(side @ torch.cholesky_solve(weights[columns], factor))
    problem.inverse.addmm_(side, torch.cholesky_solve(side.T, factor), alpha=-1)
    problem.inverse = _compact(problem.inverse, kept)
    problem.weights, problem.units = weights.index_select(0, kept), problem.units[kept]


def _compact(matrix: Tensor, kept: Tensor) -> Tensor:
    """Rows and columns `kept` (ascending) of a square matrix, moved up in its own memory: a copy would be 170 MB.

    Rows are moved in order; a row that is still to be read lies at or behind the place that is written.
    """
    size = len(kept)
    for start in range(0, size, COMPACT_ROWS):
        rows = kept[start : start + COMPACT_ROWS]
        matrix[start : start + len(rows), :size] = matrix[rows].index_select(1, kept)
    return matrix[:size, :size]
