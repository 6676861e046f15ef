"""The float operators' numpy meaning against torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lpsn_tvm import float_ops

INF = float("inf")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(got, want):
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-4, atol=1e-5)


def t(array):
    return torch.from_numpy(array)


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_conv2d(groups):
    x, w, b = normal(2, 6, 9, 8), normal(12, 6 // groups, 3, 2, seed=1), normal(12, seed=2)
    want = F.conv2d(F.pad(t(x), (0, 2, 1, 1)), t(w), t(b), stride=2, dilation=(1, 2), groups=groups)
    residual = normal(*want.shape, seed=3)
    got = float_ops.float_conv2d(
        x, w, b, residual, strides=(2, 2), padding=(1, 0, 1, 2), dilation=(1, 2), groups=groups, low=0.0, high=2.0
    )
    close(got, (want + t(residual)).clamp(0, 2))


@pytest.mark.parametrize("groups", [1, 2])
def test_conv2d_transpose(groups):
    x, w, b = normal(2, 6, 5, 4), normal(6, 4, 3, 4, seed=1), normal(4 * groups, seed=2)
    want = F.conv_transpose2d(t(x), t(w), t(b), stride=2, padding=1, output_padding=1, groups=groups)
    got = float_ops.float_conv2d_transpose(
        x, w, b, strides=(2, 2), padding=(1, 1, 1, 1), output_padding=(1, 1), groups=groups, low=-INF, high=INF
    )
    close(got, want)


def test_dense():
    x, w, b = normal(3, 5), normal(5, 7, seed=1), normal(7, seed=2)
    close(float_ops.float_dense(x, w, b, low=0.0), F.relu(t(x) @ t(w) + t(b)))


def test_poolings():
    x = normal(1, 3, 8, 9)
    window = {"kernel": (3, 3), "strides": (2, 2), "padding": (1, 1, 1, 1)}
    close(float_ops.float_max_pool2d(x, **window), F.max_pool2d(t(x), 3, 2, 1))
    for include in (False, True):
        want = F.avg_pool2d(t(x), 3, 2, 1, ceil_mode=True, count_include_pad=include)
        close(float_ops.float_avg_pool2d(x, **window, ceil_mode=True, count_include_pad=include), want)
    close(float_ops.float_global_avg_pool2d(x), t(x).mean((2, 3), keepdim=True))


def test_norm_and_softmax():
    x, scale, shift = normal(2, 3, 5, 4), normal(3, seed=1), normal(3, seed=2)
    close(
        float_ops.float_instance_norm(x, scale, shift, epsilon=1e-3),
        F.instance_norm(t(x), None, None, t(scale), t(shift), eps=1e-3),
    )
    close(float_ops.float_softmax(x, axis=1), F.softmax(t(x), 1))


FUNCTIONS = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "softplus": F.softplus,
    "selu": F.selu, "sigmoid": torch.sigmoid, "erf": torch.erf, "round": torch.round, "leaky_relu": None,
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementwise_functions(name):
    x = normal(4, 50) * 3
    steps = [[name, 0, 0.1]] if name == "leaky_relu" else [[name, 0]]
    want = F.leaky_relu(t(x), 0.1) if name == "leaky_relu" else FUNCTIONS[name](t(x))
    close(float_ops.float_elementwise(x, program=float_ops.encode_program(steps)), want)


def test_program_survives_encoding():
    steps = [["sigmoid", 0], ["multiply", 2, 0.5], ["add", 3, 1], ["clip", 4, 0.0, 6.0]]
    assert float_ops.decode_program(float_ops.encode_program(steps)) == steps
