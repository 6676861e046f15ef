"""Kernels without weights on integers: bit for bit what `quant` says, blocked and plain, any number of channels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.run_kernel import CPUS, assert_exact, rule

UINT8 = {"out_zero_point": 3, "qmin": 0, "qmax": 255, "out_dtype": "uint8"}
INT8 = {"out_zero_point": 0, "qmin": -128, "qmax": 127, "out_dtype": "int8"}
FOUR_BITS = {"out_zero_point": 5, "qmin": 0, "qmax": 15, "out_dtype": "uint8"}
OUTPUTS = {"uint8": UINT8, "int8": INT8, "4 bits": FOUR_BITS}
SHAPES = {"whole blocks": (1, 32, 9, 11), "part of a block": (2, 20, 5, 7)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
blocks = pytest.mark.parametrize("block", [16, 0], ids=["blocked", "plain"])
outputs = pytest.mark.parametrize("out", OUTPUTS.values(), ids=OUTPUTS)
dtypes = pytest.mark.parametrize("dtype", ["uint8", "int8"])


def integers(*shape, dtype="uint8", seed=0):
    info = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(info.min, info.max + 1, shape).astype(dtype)


def f32(value):
    return float(np.float32(value))


@shapes
@blocks
@dtypes
@outputs
def test_requantize(shape, block, dtype, out):
    attrs = {"multiplier": f32(0.7131), "in_zero_point": 100 if dtype == "uint8" else 0, **out}
    assert_exact(rule("lpsn.requantize"), "lpsn.requantize", [integers(*shape, dtype=dtype)], attrs, block=block)


def test_requantize_rounds_ties_to_even():
    x = np.arange(256, dtype=np.uint8).reshape(1, 16, 4, 4)
    assert_exact(rule("lpsn.requantize"), "lpsn.requantize", [x], {"multiplier": 0.5, "in_zero_point": 0, **UINT8})


@shapes
@blocks
def test_quantize_and_dequantize(shape, block):
    real = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 80
    attrs = {"inv_scale": f32(2.3), "zero_point": 100, "qmin": 0, "qmax": 255, "out_dtype": "uint8"}
    assert_exact(rule("lpsn.quantize"), "lpsn.quantize", [real], attrs, block=block)
    assert_exact(
        rule("lpsn.dequantize"),
        "lpsn.dequantize",
        [integers(*shape)],
        {"scale": f32(0.1), "zero_point": 100},
        block=block,
    )


@shapes
@blocks
@outputs
@pytest.mark.parametrize("other", ["same shape", "one pixel", "one channel"])
def test_add_and_multiply(shape, block, out, other):
    second = {"same shape": shape, "one pixel": (*shape[:2], 1, 1), "one channel": (shape[0], 1, *shape[2:])}[other]
    arrays = [integers(*shape), integers(*second, dtype="int8", seed=1)]
    points = {"a_zero_point": 100, "b_zero_point": -7}
    attrs = {"a_multiplier": f32(0.713), "b_multiplier": f32(0.2917), **points, **out}
    assert_exact(rule("lpsn.add"), "lpsn.add", arrays, attrs, block=block)
    assert_exact(
        rule("lpsn.multiply"), "lpsn.multiply", arrays, {"multiplier": f32(0.00713), **points, **out}, block=block
    )


def test_add_is_not_contracted_into_multiply_add():
    """Sums whose exact value lies next to a rounding boundary: a fused multiply-add rounds some differently."""
    a, b = integers(1, 16, 64, 64), integers(1, 16, 64, 64, seed=1)
    for seed in range(8):
        m = np.random.default_rng(seed).uniform(0.2, 0.9, 2)
        attrs = {"a_multiplier": f32(m[0]), "b_multiplier": f32(m[1]), "a_zero_point": 3, "b_zero_point": 250, **UINT8}
        assert_exact(rule("lpsn.add"), "lpsn.add", [a, b], attrs)


@shapes
@blocks
def test_lookups(shape, block):
    rng = np.random.default_rng(0)
    q4 = rng.integers(-8, 8, shape).astype("int8")
    assert_exact(
        rule("lpsn.lookup"),
        "lpsn.lookup",
        [integers(*shape)],
        {"qmin": 0},
        {"table": integers(256, seed=1)},
        block=block,
    )
    assert_exact(
        rule("lpsn.lookup"), "lpsn.lookup", [q4], {"qmin": -8}, {"table": integers(16, dtype="int8")}, block=block
    )
    table = {"table": integers(shape[1], 16, seed=2)}
    assert_exact(rule("lpsn.channel_lookup"), "lpsn.channel_lookup", [q4], {"qmin": -8}, table, block=block)


WINDOWS = {
    "3x3 stride 2": dict(kernel=(3, 3), strides=(2, 2), padding=(1, 1, 1, 1)),
    "2x2": dict(kernel=(2, 2), strides=(2, 2), padding=(0, 0, 0, 0)),
    "ceil mode": dict(kernel=(3, 2), strides=(2, 2), padding=(0, 1, 1, 0), ceil_mode=True),
}


@shapes
@blocks
@dtypes
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_pooling(shape, block, dtype, window):
    x = integers(*shape, dtype=dtype)
    assert_exact(rule("lpsn.max_pool2d"), "lpsn.max_pool2d", [x], {"dilation": (1, 1), **window}, block=block)
    for include in (False, True):
        attrs = {"count_include_pad": include, "multiplier": f32(0.77), "in_zero_point": 7, **UINT8, **window}
        assert_exact(rule("lpsn.avg_pool2d"), "lpsn.avg_pool2d", [x], attrs, block=block)


def test_dilated_max_pool():
    attrs = {"kernel": (3, 3), "strides": (1, 1), "padding": (2, 2, 2, 2), "dilation": (2, 2)}
    assert_exact(rule("lpsn.max_pool2d"), "lpsn.max_pool2d", [integers(1, 18, 9, 8, dtype="int8")], attrs)


@shapes
@blocks
@dtypes
def test_global_average(shape, block, dtype):
    attrs = {"multiplier": f32(0.8 / 99), "in_zero_point": 7, **UINT8}
    assert_exact(
        rule("lpsn.global_avg_pool2d"), "lpsn.global_avg_pool2d", [integers(*shape, dtype=dtype)], attrs, block=block
    )


@shapes
@blocks
@dtypes
def test_resize(shape, block, dtype):
    x, (height, width) = integers(*shape, dtype=dtype), shape[2:]
    rows, columns = [i // 2 for i in range(2 * height)], [i // 3 for i in range(3 * width)]
    assert_exact(
        rule("lpsn.resize_nearest"), "lpsn.resize_nearest", [x], {"rows": rows, "columns": columns}, block=block
    )
    info = np.iinfo(dtype)
    attrs = {"qmin": int(info.min), "qmax": int(info.max)}
    for axis, size in (("row", height), ("column", width)):
        attrs[f"{axis}s"] = [min(size - 1, v) for i in range(2 * size) for v in (i // 2, i // 2 + 1)]
        attrs[f"{axis}_weights"] = [v for i in range(2 * size) for v in ((128, 0) if i % 2 == 0 else (61, 67))]
    assert_exact(rule("lpsn.resize_linear"), "lpsn.resize_linear", [x], attrs, block=block)


@shapes
@blocks
@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_pad(shape, block, mode):
    attrs = {"pad_width": (1, 2, 3, 0), "value": 9, "mode": mode}
    assert_exact(rule("lpsn.pad"), "lpsn.pad", [integers(*shape)], attrs, block=block)


@shapes
@blocks
def test_data_movement(shape, block):
    x = integers(*shape)
    n, c, h, w = shape
    for begin, end, stride, axis in ((16, c, 1, 1), (3, c, 2, 1), (1, w, 2, 3), (h - 1, -1, -2, 2), (0, 1, 1, 0)):
        attrs = {"axes": (axis,), "begin": (begin,), "end": (end,), "strides": (stride,)}
        assert_exact(rule("lpsn.strided_slice"), "lpsn.strided_slice", [x], attrs, block=block)
    for mode in ("DCR", "CRD"):
        assert_exact(
            rule("lpsn.depth_to_space"), "lpsn.depth_to_space", [x], {"block_size": 2, "mode": mode}, block=block
        )
    for target in ((n, c * h * w), (n, c // 4, 4, h * w), (n, c, h * w, 1)):
        assert_exact(rule("lpsn.reshape"), "lpsn.reshape", [x], {"shape": target}, block=block)
    for axes in ((0, 2, 3, 1), (0, 1, 3, 2)):
        assert_exact(rule("lpsn.transpose"), "lpsn.transpose", [x], {"axes": axes}, block=block)


def test_depth_to_space_of_whole_blocks_stays_blocked():
    assert_exact(
        rule("lpsn.depth_to_space"), "lpsn.depth_to_space", [integers(1, 64, 3, 5)], {"block_size": 2, "mode": "DCR"}
    )


@blocks
@pytest.mark.parametrize("channels", [(32, 16), (20, 33), (3, 16, 5)], ids=str)
def test_concat_of_channels(block, channels):
    arrays = [integers(2, c, 5, 6, seed=i) for i, c in enumerate(channels)]
    scales = [1.0, f32(0.31), 2.0][: len(channels)]
    attrs = {"axis": 1, "multipliers": scales, "zero_points": [3, 9, 3][: len(channels)], **UINT8}
    assert_exact(rule("lpsn.concat"), "lpsn.concat", arrays, attrs, block=block)


@blocks
@pytest.mark.parametrize("axis", [2, 3])
def test_concat_of_pixels(block, axis):
    arrays = [integers(1, 20, 5, 6, seed=i) for i in range(2)]
    attrs = {"axis": axis, "multipliers": [1.0, f32(0.31)], "zero_points": [3, 9], **UINT8}
    assert_exact(rule("lpsn.concat"), "lpsn.concat", arrays, attrs, block=block)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("shape", [(1, 64, 5, 5), (2, 20, 9, 11), (1, 3, 7, 3), (1, 48, 33, 67)], ids=str)
def test_lookup_of_every_byte_on_every_cpu(cpu, shape):
    x, table = integers(*shape), integers(256, dtype="int8", seed=1)
    for block in (16, 0):
        assert_exact(rule("lpsn.lookup"), "lpsn.lookup", [x], {"qmin": 0}, {"table": table}, cpu=cpu, block=block)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("channels", [(64, 33, 33), (1, 1, 1, 1), (15, 1, 16, 17), (130,), (16, 7)], ids=str)
def test_concat_at_any_offset_on_every_cpu(cpu, channels):
    arrays = [integers(2, c, 9, 11, seed=i, dtype=("uint8", "int8")[i % 2]) for i, c in enumerate(channels)]
    attrs = {"axis": 1, "multipliers": [f32(0.9 - 0.2 * i) for i in range(len(channels))], **UINT8}
    attrs["zero_points"] = [7 * i for i in range(len(channels))]
    assert_exact(rule("lpsn.concat"), "lpsn.concat", arrays, attrs, cpu=cpu)
    copied = {**attrs, "multipliers": [1.0] * len(channels), "zero_points": [3] * len(channels)}
    assert_exact(rule("lpsn.concat"), "lpsn.concat", [a.view("uint8") for a in arrays], copied, cpu=cpu)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("cut", [(5, 38, 1), (16, 32, 1), (0, 40, 3), (39, 40, 1), (15, 17, 1)], ids=str)
def test_channel_slice_at_any_offset(cpu, cut):
    begin, end, step = cut
    attrs = {"axes": [1], "begin": [begin], "end": [end], "strides": [step]}
    assert_exact(rule("lpsn.strided_slice"), "lpsn.strided_slice", [integers(2, 40, 7, 13)], attrs, cpu=cpu)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    channels=st.integers(1, 40),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    seed=st.integers(0, 99),
    cpu=st.sampled_from(list(CPUS)),
)
def test_random_shapes_on_every_cpu(channels, height, width, seed, cpu):
    rng = np.random.default_rng(seed)
    a, b = integers(1, channels, height, width, seed=seed), integers(1, channels, height, width, seed=seed + 1)
    attrs = {
        "a_multiplier": f32(rng.uniform(0.1, 2)),
        "b_multiplier": f32(rng.uniform(0.1, 2)),
        "a_zero_point": int(rng.integers(256)),
    }
    assert_exact(rule("lpsn.add"), "lpsn.add", [a, b], {**attrs, "b_zero_point": 77, **UINT8}, cpu=cpu)
    window = {"kernel": (2, 3), "strides": (1, 2), "padding": (1, 1, 0, 1)}
    assert_exact(
        rule("lpsn.avg_pool2d"),
        "lpsn.avg_pool2d",
        [a],
        {**window, "in_zero_point": 9, "multiplier": f32(1.3), **UINT8},
        cpu=cpu,
    )
