"""Float convolution, depthwise, transposed convolution and dense kernels against `float_ops`."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpsn_tvm import float_ops
from lpsn_tvm.schedules.kernel import TensorSpec
from lpsn_tvm.schedules.llvm.conv2d_float import conv2d_float
from lpsn_tvm.schedules.llvm.conv2d_transpose_float import conv2d_transpose_float
from lpsn_tvm.schedules.llvm.dense_float import dense_float
from lpsn_tvm.schedules.llvm.depthwise_float import depthwise_float
from lpsn_tvm.schedules.llvm.float_groups import channel_reads
from lpsn_tvm.schedules.llvm.float_tiles import choose_tile
from lpsn_tvm.schedules.llvm.isa import AVX2, AVX512_VNNI, GENERIC
from tests.support.run_kernel import assert_close

INF = float("inf")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def convolution(
    n,
    c,
    o,
    h,
    w,
    kernel,
    stride=1,
    padding=0,
    groups=1,
    dilation=1,
    residual=False,
    low=-INF,
    high=INF,
    cpu="avx512",
    block=16,
):
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (padding,) * 4 if isinstance(padding, int) else padding
    attrs = {
        "strides": (stride, stride),
        "padding": padding,
        "dilation": (dilation, dilation),
        "groups": groups,
        "low": low,
        "high": high,
    }
    oh = (h + padding[0] + padding[2] - dilation * (kernel[0] - 1) - 1) // stride + 1
    ow = (w + padding[1] + padding[3] - dilation * (kernel[1] - 1) - 1) // stride + 1
    arrays = [normal(n, c, h, w)] + ([normal(n, o, oh, ow, seed=3)] if residual else [])
    constants = {"weight": normal(o, c // groups, *kernel, seed=1), "bias": normal(o, seed=2)}
    builder = depthwise_float if groups == c == o and groups > 1 else conv2d_float
    assert_close(builder, "lpsn.float_conv2d", arrays, attrs, constants, cpu, block)


CASES = {
    "3x3": dict(n=1, c=32, o=48, h=9, w=14, kernel=3, padding=1),
    "3x3 stride 2": dict(n=2, c=16, o=32, h=15, w=14, kernel=3, stride=2, padding=1),
    "1x1": dict(n=1, c=48, o=64, h=7, w=7, kernel=1),
    "1x1 stride 2": dict(n=1, c=16, o=32, h=14, w=14, kernel=1, stride=2),
    "1x1 one pixel": dict(n=1, c=40, o=24, h=1, w=1, kernel=1),
    "image": dict(n=1, c=3, o=16, h=23, w=21, kernel=7, stride=2, padding=3),
    "one channel": dict(n=1, c=1, o=8, h=12, w=10, kernel=5, padding=2),
    "odd channels": dict(n=1, c=21, o=35, h=6, w=11, kernel=3, padding=1),
    "channels in halves of a block": dict(n=1, c=24, o=40, h=6, w=8, kernel=1),
    "prime width": dict(n=1, c=16, o=16, h=5, w=37, kernel=1),
    "uneven padding, dilation": dict(
        n=2, c=17, o=5, h=13, w=11, kernel=(3, 5), stride=2, padding=(1, 0, 2, 3), dilation=2
    ),
    "residual and relu": dict(n=1, c=16, o=20, h=8, w=8, kernel=3, padding=1, residual=True, low=0.0),
    "relu6": dict(n=1, c=16, o=16, h=8, w=8, kernel=3, padding=1, low=0.0, high=6.0),
    "groups of whole blocks": dict(n=1, c=64, o=64, h=6, w=7, kernel=3, padding=1, groups=2),
    "groups of 8": dict(n=1, c=24, o=24, h=6, w=7, kernel=3, padding=1, groups=3),
    "groups of 10": dict(n=1, c=36, o=60, h=7, w=5, kernel=3, padding=1, groups=6),
    "depthwise multiplier 2": dict(n=1, c=12, o=24, h=7, w=5, kernel=3, padding=1, groups=12),
    "depthwise": dict(n=2, c=40, o=40, h=9, w=14, kernel=3, padding=1, groups=40, low=0.0, high=6.0),
    "depthwise stride 2": dict(n=1, c=20, o=20, h=13, w=15, kernel=5, stride=2, padding=2, groups=20, residual=True),
    "depthwise 7x7 dilated": dict(n=1, c=16, o=16, h=17, w=13, kernel=7, padding=(3, 1, 4, 2), dilation=2, groups=16),
    "depthwise 1x1": dict(n=1, c=20, o=20, h=5, w=7, kernel=1, groups=20),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_convolution_equals_reference(case):
    convolution(**case)


@pytest.mark.parametrize("cpu", ["avx2", "generic"])
@pytest.mark.parametrize("name", ["3x3", "image", "groups of 10", "depthwise", "prime width"])
def test_convolution_on_other_cpus(name, cpu):
    convolution(**CASES[name], cpu=cpu)


SILU = float_ops.encode_program([["sigmoid", 0], ["multiply", 0, 1], ["tanh", 2]])


@pytest.mark.parametrize("cpu", ["avx512", "generic"])
def test_program_behind_a_layer(cpu):
    layer = {"strides": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1), "low": -INF, "high": 5.0, "program": SILU}
    x, bias = normal(1, 20, 9, 14), normal(20, seed=2)
    for groups, builder in ((1, conv2d_float), (20, depthwise_float)):
        constants = {"weight": normal(20, 20 // groups, 3, 3, seed=1), "bias": bias}
        assert_close(builder, "lpsn.float_conv2d", [x], {**layer, "groups": groups}, constants, cpu)
    constants = {"weight": normal(20, 20, 3, 3, seed=1), "bias": bias}
    attrs = {**layer, "strides": (2, 2), "output_padding": (0, 1), "groups": 1}
    assert_close(conv2d_transpose_float, "lpsn.float_conv2d_transpose", [x], attrs, constants, cpu)
    constants = {"weight": normal(17, 20, seed=1), "bias": bias}
    attrs = {"low": -INF, "high": INF, "program": SILU}
    assert_close(dense_float, "lpsn.float_dense", [normal(3, 17)], attrs, constants, cpu)


def test_large_input_is_padded_chunk_by_chunk(monkeypatch):
    from lpsn_tvm.schedules.llvm import conv2d_float as module

    monkeypatch.setattr(module, "ROOT_PAD_BYTES", 0)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 13)
    convolution(n=2, c=20, o=24, h=19, w=17, kernel=3, padding=1)
    convolution(n=1, c=3, o=24, h=33, w=17, kernel=5, stride=2, padding=2)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_convolutions(data):
    groups = data.draw(st.sampled_from([1, 1, 2, 5]))
    kernel = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    dilation = data.draw(st.integers(1, 2))
    convolution(
        n=data.draw(st.integers(1, 2)),
        c=groups * data.draw(st.integers(1, 20)),
        o=groups * data.draw(st.integers(1, 20)),
        h=data.draw(st.integers(8, 20)),
        w=data.draw(st.integers(8, 20)),
        kernel=kernel,
        stride=data.draw(st.integers(1, 3)),
        padding=tuple(data.draw(st.integers(0, 2)) for _ in range(4)),
        groups=groups,
        dilation=dilation,
        residual=data.draw(st.booleans()),
        low=data.draw(st.sampled_from([-INF, 0.0])),
        block=data.draw(st.sampled_from([0, 16])),
    )


TRANSPOSED = {
    "4x4 stride 2": (1, 32, 20, 7, 6, 4, 2, 1, 0, 1),
    "3x3 stride 2, output padding": (1, 16, 32, 5, 6, 3, 2, 1, 1, 1),
    "2x2 stride 2": (2, 16, 16, 5, 8, 2, 2, 0, 0, 1),
    "3x3 stride 1": (1, 20, 12, 7, 9, 3, 1, 1, 0, 1),
    "stride above kernel": (1, 3, 5, 6, 6, 2, 3, 0, 1, 1),
    "groups": (1, 12, 18, 7, 9, 3, 2, 1, 1, 3),
    "depthwise": (1, 20, 20, 7, 9, 5, 2, 2, 1, 20),
}


@pytest.mark.parametrize("case", TRANSPOSED.values(), ids=TRANSPOSED)
def test_transposed_convolution_equals_reference(case):
    n, c, o, h, w, kernel, stride, pad, output_padding, groups = case
    attrs = {
        "strides": (stride, stride),
        "padding": (pad, pad, pad, pad),
        "output_padding": (output_padding, output_padding),
        "dilation": (1, 1),
        "groups": groups,
        "low": 0.0,
        "high": INF,
    }
    constants = {"weight": normal(c, o // groups, kernel, kernel, seed=1), "bias": normal(o, seed=2)}
    assert_close(conv2d_transpose_float, "lpsn.float_conv2d_transpose", [normal(n, c, h, w)], attrs, constants)


def test_transposed_convolution_dilated_uneven():
    attrs = {
        "strides": (1, 2),
        "padding": (1, 0, 2, 1),
        "output_padding": (0, 1),
        "dilation": (2, 3),
        "groups": 2,
        "low": -INF,
        "high": 1.0,
    }
    constants = {"weight": normal(8, 5, 3, 2, seed=1), "bias": normal(10, seed=2)}
    assert_close(conv2d_transpose_float, "lpsn.float_conv2d_transpose", [normal(2, 8, 5, 7)], attrs, constants)


@pytest.mark.parametrize("shape", [(1, 512, 100), (1, 17, 10), (4, 64, 130), (3, 33, 16), (7, 20, 48)], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_dense_equals_reference(shape, residual):
    batch, depth, width = shape
    arrays = [normal(batch, depth)] + ([normal(batch, width, seed=3)] if residual else [])
    constants = {"weight": normal(depth, width, seed=1), "bias": normal(width, seed=2)}
    assert_close(dense_float, "lpsn.float_dense", arrays, {"low": 0.0, "high": 9.0}, constants)


def test_equal_layers_share_their_function():
    attrs = {"strides": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1, "low": 0.0, "high": INF}
    spec = (TensorSpec((1, 16, 8, 8), "float32", 16),)
    keys = {
        conv2d_float(spec, {"weight": normal(16, 16, 3, 3, seed=s), "bias": normal(16, seed=s)}, attrs, AVX512_VNNI).key
        for s in (1, 2)
    }
    assert len(keys) == 1


@pytest.mark.parametrize("isa", [AVX512_VNNI, AVX2, GENERIC], ids=lambda isa: isa.name)
@pytest.mark.parametrize("size", [(56, 56), (7, 7), (53, 53), (1, 1), (240, 320)], ids=str)
def test_tiles_fit_the_registers(isa, size):
    tile = choose_tile(*size, 8, 576, isa)
    parts = 16 // isa.float_lanes
    assert (tile.rows * tile.columns * tile.blocks + tile.blocks) * parts + 1 <= isa.registers
    assert 8 % tile.blocks == 0


def test_channel_reads_of_odd_groups_cover_every_group():
    reads = channel_reads(36, 60, 6)
    for channel in range(60):
        first = reads.first[channel // 16]
        group = channel // 10
        assert first <= group * 6 and (group + 1) * 6 <= first + reads.span
