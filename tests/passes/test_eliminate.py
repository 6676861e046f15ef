import numpy as np
import pytest
import torch

from lpsn_tvm.passes import eliminate as module
from lpsn_tvm.passes.eliminate import eliminate, problem_of, unit_costs
from lpsn_tvm.passes.resolve import damping_vector


def least_squares(seed, channels=6, taps=2, outputs=4, rows=200):
    torch.manual_seed(seed)
    base = torch.randn(rows, channels * taps).double()
    mixed = base @ (torch.eye(channels * taps) + 0.4 * torch.randn(channels * taps, channels * taps)).double()
    x = torch.cat([mixed, torch.ones(rows, 1).double()], dim=1)
    y = x @ torch.randn(channels * taps + 1, outputs).double() + 0.1 * torch.randn(rows, outputs).double()
    units = torch.cat([torch.arange(channels).repeat_interleave(taps), torch.tensor([-1])])
    return x, y, units


def ridge_loss(x, y, kept, ridge):
    """Smallest damped error over the kept columns."""
    xs, damping = x[:, kept], torch.diag(ridge[kept])
    weights = torch.linalg.solve(xs.T @ xs + damping, xs.T @ y)
    return float((xs @ weights - y).square().sum() + (weights * (damping @ weights)).sum())


def make(x, y, units, weight=1.0):
    gram = x.T @ x
    ridge = damping_vector(gram[None], 1e-4)[0]
    return problem_of(gram, x.T @ y, torch.zeros(len(gram), y.shape[1]).double(), units, weight), ridge


def brute_force(systems, count):
    """Greedy removal with a full re-fit for every candidate."""
    order, costs, channels = [], [], 6
    for _ in range(count):
        best = None
        for unit in set(range(channels)) - set(order):
            total = 0.0
            for x, y, units, weight, ridge in systems:
                before = ridge_loss(x, y, ~torch.isin(units, torch.tensor(order, dtype=torch.int64)), ridge)
                after = ridge_loss(x, y, ~torch.isin(units, torch.tensor([*order, unit])), ridge)
                total += weight * (after - before)
            best = min(best, (total, unit)) if best else (total, unit)
        order.append(best[1])
        costs.append(best[0])
    return order, costs


@pytest.mark.parametrize("lazy", [False, True], ids=["one-by-one", "batched"])
def test_order_and_costs_equal_a_full_refit(lazy, monkeypatch):
    if lazy:  # all candidates in one pool: the batched path is exact too
        monkeypatch.setattr(module, "EXACT_WORK", 0)
        monkeypatch.setattr(module, "BATCH_FRACTION", 0.5)
    systems, problems = [], []
    for seed, taps, weight in ((0, 2, 1.0), (1, 1, 3.0)):
        x, y, units = least_squares(seed, taps=taps)
        problem, ridge = make(x, y, units, weight)
        problems.append(problem)
        systems.append((x, y, units, weight, ridge))
    result = eliminate(problems, 6, 4)
    order, costs = brute_force(systems, 4)
    assert result.order.tolist() == order
    np.testing.assert_allclose(result.costs.numpy(), costs, rtol=1e-6)


def test_weights_left_are_the_refit():
    x, y, units = least_squares(2)
    problem, ridge = make(x, y, units)
    result = eliminate([problem], 6, 3)
    kept = ~torch.isin(units, result.order)
    xs = x[:, kept]
    torch.testing.assert_close(problem.weights, torch.linalg.solve(xs.T @ xs + torch.diag(ridge[kept]), xs.T @ y))


def test_of_two_equal_channels_one_goes_and_the_other_stays(monkeypatch):
    monkeypatch.setattr(module, "EXACT_WORK", 0)
    monkeypatch.setattr(module, "BATCH_FRACTION", 1.0)
    x, y, units = least_squares(3, taps=1)
    x[:, 1] = x[:, 0]
    y = x @ torch.randn(7, 4).double()
    problem, _ = make(x, y, units)
    result = eliminate([problem], 6, 2)
    assert result.order[0] in (0, 1) and result.order[1] not in (0, 1)
    assert result.costs[0] < 1e-2 * result.costs[1]


def test_budget_stops_and_one_unit_always_stays():
    x, y, units = least_squares(4)
    everything = eliminate([make(x, y, units)[0]], 6, 99)
    assert len(everything.order) == 5
    budget = float(everything.costs[:3].sum()) * 1.0001
    assert eliminate([make(x, y, units)[0]], 6, 99, budget).order.tolist() == everything.order[:3].tolist()


def test_units_of_different_width_and_units_that_are_not_read():
    x, y, _ = least_squares(5)
    units = torch.tensor([0, 0, 0, 1, 2, 2, 4, 4, 4, -1, -1, 5, -1])
    problem, ridge = make(x, y, units)
    costs = unit_costs(problem, 6)
    full = ridge_loss(x, y, torch.ones(13, dtype=torch.bool), ridge)
    assert costs[3] == 0
    for unit in (0, 1, 2, 4, 5):
        assert float(costs[unit]) == pytest.approx(ridge_loss(x, y, units != unit, ridge) - full, rel=1e-6)
