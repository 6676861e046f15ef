import pytest
import torch
from torch.nn import functional as F

from lpsn_tvm.passes.normal_equations import LayerGeometry, NormalEquations

CONVS = {
    "plain": dict(groups=1, i=4, o=6, k=(3, 3), s=(1, 1), d=(1, 1), p=(1, 1, 1, 1)),
    "strided-asymmetric": dict(groups=1, i=3, o=5, k=(3, 2), s=(2, 3), d=(1, 1), p=(0, 1, 2, 0)),
    "dilated": dict(groups=1, i=3, o=2, k=(3, 3), s=(1, 1), d=(2, 2), p=(2, 2, 2, 2)),
    "grouped": dict(groups=2, i=4, o=6, k=(3, 3), s=(1, 1), d=(1, 1), p=(1, 1, 1, 1)),
    "depthwise": dict(groups=5, i=5, o=5, k=(3, 3), s=(2, 2), d=(1, 1), p=(1, 1, 1, 1)),
}


def conv_case(groups, i, o, k, s, d, p):
    x, weight, bias = torch.randn(2, i, 9, 8), torch.randn(o, i // groups, *k), torch.randn(o)
    y = F.conv2d(F.pad(x, (p[1], p[3], p[0], p[2])), weight, bias, s, 0, d, groups)
    geometry = LayerGeometry("conv2d", groups, i, o, k, s, d, p, (9, 8), tuple(y.shape[2:]))
    return geometry, x, weight, bias, y


def transpose_case():
    x, weight, bias = torch.randn(2, 4, 5, 6), torch.randn(4, 3, 3, 4), torch.randn(6)
    y = F.conv_transpose2d(x, weight, bias, stride=2, padding=1, output_padding=1, groups=2, dilation=(1, 2))
    geometry = LayerGeometry(
        "conv2d_transpose", 2, 4, 6, (3, 4), (2, 2), (1, 2), (1, 1, 1, 1), (5, 6), tuple(y.shape[2:])
    )
    return geometry, x, weight, bias, y


def dense_case():
    x, weight, bias = torch.randn(7, 5), torch.randn(5, 3), torch.randn(3)
    return LayerGeometry("dense", 1, 5, 3), x, weight, bias, x @ weight + bias


CASES = {
    **{name: lambda a=args: conv_case(**a) for name, args in CONVS.items()},
    "transposed": transpose_case,
    "dense": dense_case,
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_times_weight_matrix_is_the_layer(case):
    torch.manual_seed(0)
    geometry, x, weight, bias, y = CASES[case]()
    where = geometry.sample_positions(11, seed=3, name="layer", batch=1)
    matrix = geometry.weight_matrix(weight, bias)
    rows = geometry.rows(x, where)
    outputs = torch.bmm(rows.double(), matrix).transpose(0, 1).reshape(rows.shape[1], -1)
    torch.testing.assert_close(outputs.float(), geometry.targets(y, where), rtol=1e-4, atol=1e-4)
    back = geometry.split_matrix(matrix)
    assert torch.equal(back[0], weight) and torch.equal(back[1], bias)


def test_some_channels_only():
    torch.manual_seed(0)
    geometry, x, *_ = conv_case(**CONVS["plain"])
    where = torch.arange(geometry.positions)
    columns = torch.tensor([1, 3])[:, None] * 9 + torch.arange(9)
    everything = geometry.rows(x, where)
    expected = torch.cat([everything[:, :, columns.reshape(-1)], everything[:, :, -1:]], dim=2)
    assert torch.equal(geometry.rows(x, where, torch.tensor([1, 3])), expected)


def test_float32_products_agree_with_float64():
    torch.manual_seed(0)
    x = torch.randn(1, 400, 1500).relu() + 0.1
    y = torch.randn(400, 3)
    equations = NormalEquations(1, 1500, 3)
    for half in (slice(0, 150), slice(150, 400)):
        equations.add(x[:, half], y[half])
    exact = torch.bmm(x.double().transpose(1, 2), x.double())
    assert equations.rows == 400
    assert float((equations.gram - exact).abs().max() / exact.diagonal(dim1=1, dim2=2).mean()) < 5e-6
    torch.testing.assert_close(equations.moment[0], x[0].double().T @ y.double(), rtol=1e-4, atol=1e-3)


def test_positions_depend_on_seed_layer_and_batch_only():
    geometry = LayerGeometry("conv2d", 1, 1, 1, out_size=(20, 20), in_size=(20, 20))
    first = geometry.sample_positions(30, 0, "a", 0)
    assert torch.equal(first, geometry.sample_positions(30, 0, "a", 0))
    assert len(first.unique()) == 30
    for other in (
        geometry.sample_positions(30, 1, "a", 0),
        geometry.sample_positions(30, 0, "b", 0),
        geometry.sample_positions(30, 0, "a", 1),
    ):
        assert not torch.equal(first, other)
