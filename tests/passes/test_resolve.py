import torch

from lpsn_tvm.passes.resolve import relative_error, solve


def system(rows=60, columns=8, outputs=3, groups=2):
    torch.manual_seed(1)
    x = torch.cat([torch.randn(groups, rows, columns), torch.ones(groups, rows, 1)], dim=2).double()
    weights = torch.randn(groups, columns + 1, outputs).double()
    return x, weights, x @ weights


def test_exact_system_is_recovered_and_the_true_prior_is_a_fixed_point():
    x, weights, y = system()
    gram, moment = x.transpose(1, 2) @ x, x.transpose(1, 2) @ y
    torch.testing.assert_close(solve(gram, moment, torch.zeros_like(weights), 1e-9), weights, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(solve(gram, moment, weights, 1e-1), weights, rtol=1e-12, atol=1e-12)


def test_zero_inputs_keep_their_weights():
    x, weights, y = system()
    x[:, :, 2] = 0
    gram, moment = x.transpose(1, 2) @ x, x.transpose(1, 2) @ y
    torch.testing.assert_close(solve(gram, moment, weights)[:, 2], weights[:, 2])
    x[:, :, :-1] = 0
    gram, moment = x.transpose(1, 2) @ x, x.transpose(1, 2) @ y
    solved = solve(gram, moment, weights)
    torch.testing.assert_close(solved[:, -1], y.mean(dim=1), rtol=1e-6, atol=1e-6)


def test_fewer_rows_than_columns_keep_to_the_prior():
    x, weights, _ = system(rows=4, columns=20, groups=1)
    gram, moment = x.transpose(1, 2) @ x, x.transpose(1, 2) @ (x @ weights)
    noisy = solve(gram, moment, weights + 0.1)
    assert float((noisy - weights)[:, :-1].norm()) <= float(torch.full_like(weights[:, :-1], 0.1).norm())


def test_relative_error_from_sums():
    x, weights, y = system(groups=1)
    gram, moment = x.transpose(1, 2) @ x, x.transpose(1, 2) @ y
    other = weights + 0.05
    spread = (y - y.mean(dim=1, keepdim=True)).square().sum()
    expected = float((x @ other - y).square().sum() / spread)
    assert abs(relative_error(gram, moment, y.square().sum(), other, spread) - expected) < 1e-9
