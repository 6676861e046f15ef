"""Weighted int8 kernels equal `quant.py` bit for bit, whatever the shape and the instruction set."""

import numpy as np
import pytest
from int8_kernels import run_kernel, target_of

from lpsn_tvm import quant
from lpsn_tvm.schedules.kernel import TensorSpec
from lpsn_tvm.schedules.llvm.conv2d_int8 import conv2d
from lpsn_tvm.schedules.llvm.conv2d_transpose_int8 import conv2d_transpose
from lpsn_tvm.schedules.llvm.dense_int8 import dense
from lpsn_tvm.schedules.llvm.depthwise_int8 import depthwise

EVERY_ISA = ("avx512-vnni", "avx512-vnni-no-vbmi", "avx512", "avx-vnni", "avx2", "generic")


def integers(rng, shape, dtype):
    info = np.iinfo(dtype)
    return rng.integers(info.min, info.max + 1, shape).astype(dtype)


def layer(rng, data, weight, out_channels, kind, isa_name, *, block=16, dtype="uint8", residual_shape=None, **attrs):
    """Run builder `kind` and its reference on random values, extremes included."""
    target, isa = target_of(isa_name)
    x, w = integers(rng, data, dtype), integers(rng, weight, "int8")
    constants = {
        "weight": w,
        "bias": rng.integers(-3000, 3000, out_channels).astype(np.int32),
        "scale": (rng.random(out_channels) * 4e-3 / np.sqrt(np.prod(weight[1:]))).astype(np.float32),
    }
    attrs = {"x_zero_point": 113, "out_zero_point": 97, "qmin": 3, "qmax": 251, "out_dtype": "uint8", **attrs}
    arrays, specs = [x], [TensorSpec(data, dtype, block)]
    if residual_shape is not None:
        attrs.update(residual_multiplier=0.7, residual_zero_point=31)
        arrays.append(integers(rng, residual_shape, "uint8"))
        specs.append(TensorSpec(residual_shape, "uint8", 16))
    builder = {"conv2d": conv2d, "depthwise": depthwise, "dense": dense, "conv2d_transpose": conv2d_transpose}[kind]
    kernel = builder(tuple(specs), constants, attrs, isa)
    reference = getattr(quant, "conv2d" if kind == "depthwise" else kind)
    want = reference(x, *constants.values(), *arrays[1:], **attrs)
    if attrs["out_dtype"] != "float32":
        assert len(np.unique(want)) > min(20, want.size // 2), "the case does not exercise the rounding"
    np.testing.assert_array_equal(run_kernel(kernel, arrays, target), want)


def conv(
    data,
    out,
    kernel,
    isa,
    seed=0,
    groups=1,
    strides=(1, 1),
    padding=(0, 0, 0, 0),
    dilation=(1, 1),
    residual=False,
    kind="conv2d",
    **more,
):
    n, c, h, w = data
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    oh = (h + padding[0] + padding[2] - dilation[0] * (kernel[0] - 1) - 1) // strides[0] + 1
    ow = (w + padding[1] + padding[3] - dilation[1] * (kernel[1] - 1) - 1) // strides[1] + 1
    layer(
        np.random.default_rng(seed),
        data,
        (out, c // groups, *kernel),
        out,
        kind,
        isa,
        groups=groups,
        strides=strides,
        padding=padding,
        dilation=dilation,
        residual_shape=(n, out, oh, ow) if residual else None,
        **more,
    )


@pytest.mark.parametrize("isa", EVERY_ISA)
class TestEveryInstructionSet:
    def test_convolution_with_residual_and_lopsided_padding(self, isa):
        conv((2, 20, 6, 11), 24, 3, isa, padding=(1, 0, 2, 1), residual=True)

    def test_pointwise(self, isa):
        conv((2, 33, 5, 7), 40, 1, isa)

    def test_int8_data(self, isa):
        conv((1, 18, 5, 6), 20, 3, isa, padding=(1, 1, 1, 1), dtype="int8", x_zero_point=-7)

    def test_grouped_to_float(self, isa):
        conv((1, 24, 5, 6), 36, 3, isa, groups=3, out_dtype="float32")

    def test_depthwise(self, isa):
        conv((2, 20, 9, 11), 20, 3, isa, groups=20, padding=(1, 0, 1, 2), residual=True, kind="depthwise")

    def test_dense(self, isa):
        layer(np.random.default_rng(1), (3, 50), (50, 40), 40, "dense", isa, residual_shape=(3, 40))

    def test_transposed(self, isa):
        layer(
            np.random.default_rng(2),
            (1, 20, 4, 5),
            (20, 24, 4, 4),
            24,
            "conv2d_transpose",
            isa,
            strides=(2, 2),
            padding=(1, 1, 1, 1),
            output_padding=(0, 0),
            dilation=(1, 1),
            groups=1,
        )


VNNI = "avx512-vnni"


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            {"data": (1, 3, 15, 15), "out": 20, "kernel": 7, "strides": (2, 2), "padding": (3, 3, 3, 3), "block": 4},
            id="first-layer",
        ),
        pytest.param({"data": (1, 3, 9, 9), "out": 20, "kernel": 3, "block": 0}, id="plain-input"),
        pytest.param({"data": (1, 7, 9, 9), "out": 5, "kernel": 3, "block": 8}, id="input-blocks-of-8"),
        pytest.param(
            {"data": (1, 16, 13, 53), "out": 32, "kernel": (1, 3), "strides": (1, 2), "padding": (0, 1, 0, 1)},
            id="prime-width",
        ),
        pytest.param({"data": (1, 16, 40, 1), "out": 16, "kernel": (3, 1), "padding": (1, 0, 1, 0)}, id="width-one"),
        pytest.param({"data": (3, 16, 1, 1), "out": 16, "kernel": 1}, id="one-pixel"),
        pytest.param(
            {"data": (1, 16, 9, 9), "out": 112, "kernel": 3, "dilation": (2, 3), "padding": (2, 3, 2, 3)}, id="dilated"
        ),
        pytest.param({"data": (1, 64, 8, 8), "out": 32, "kernel": 1, "strides": (2, 2)}, id="pointwise-strided"),
        pytest.param({"data": (1, 16, 7, 7), "out": 80, "kernel": 1, "padding": (1, 1, 1, 1)}, id="pointwise-padded"),
        pytest.param(
            {"data": (1, 32, 6, 7), "out": 48, "kernel": 3, "groups": 8, "padding": (1, 1, 1, 1)}, id="narrow-groups"
        ),
        pytest.param({"data": (1, 64, 6, 7), "out": 64, "kernel": 3, "groups": 2}, id="whole-block-groups"),
        pytest.param({"data": (1, 30, 6, 7), "out": 42, "kernel": 1, "groups": 6}, id="groups-across-blocks"),
        pytest.param({"data": (1, 12, 6, 7), "out": 24, "kernel": 3, "groups": 12}, id="depth-multiplier"),
        pytest.param({"data": (1, 16, 6, 7), "out": 16, "kernel": 3, "qmin": 97, "qmax": 97 + 60}, id="relu6-clamp"),
    ],
)
def test_convolution(case):
    conv(isa=VNNI, **case)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            {"data": (1, 20, 13, 9), "kernel": 5, "strides": (2, 2), "padding": (2, 2, 2, 2)}, id="5x5-strided"
        ),
        pytest.param({"data": (1, 16, 30, 40), "kernel": 7, "padding": (3, 3, 3, 3)}, id="7x7-rows-in-chunks"),
        pytest.param({"data": (1, 18, 9, 9), "kernel": 3, "dilation": (2, 2), "padding": (2, 2, 2, 2)}, id="dilated"),
        pytest.param({"data": (1, 18, 9, 9), "kernel": 3, "dtype": "int8"}, id="int8"),
        pytest.param({"data": (1, 18, 3, 3), "kernel": 3, "out_dtype": "float32"}, id="one-output-pixel"),
        pytest.param({"data": (1, 18, 1, 5), "kernel": (1, 5), "padding": (0, 4, 0, 4)}, id="row-kernel"),
        pytest.param({"data": (1, 40, 8, 8), "kernel": 1}, id="batch-norm"),
    ],
)
def test_depthwise(case):
    channels = case["data"][1]
    conv(isa=VNNI, out=channels, groups=channels, kind="depthwise", **case)


def test_depthwise_leaves_other_groups_alone():
    _, isa = target_of("generic")
    weight = np.zeros((24, 1, 3, 3), np.int8)
    assert depthwise((TensorSpec((1, 12, 6, 6), "uint8", 16),), {"weight": weight}, {"groups": 12}, isa) is None


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            {"kernel": 3, "strides": (2, 2), "padding": (1, 1, 1, 1), "output_padding": (1, 1)}, id="3x3-output-padding"
        ),
        pytest.param({"kernel": 2, "strides": (2, 2)}, id="2x2"),
        pytest.param({"kernel": 4, "strides": (3, 2), "padding": (0, 2, 1, 0)}, id="strides-differ"),
        pytest.param({"kernel": 3, "strides": (1, 1), "padding": (1, 1, 1, 1)}, id="stride-1"),
        pytest.param({"kernel": 1, "strides": (2, 3)}, id="phases-without-taps"),
        pytest.param({"kernel": 3, "strides": (2, 2), "dilation": (2, 2), "padding": (1, 1, 1, 1)}, id="dilated"),
        pytest.param({"kernel": 4, "strides": (2, 2), "groups": 2, "padding": (1, 1, 1, 1)}, id="grouped"),
    ],
)
def test_transposed_convolution(case):
    case = {"padding": (0, 0, 0, 0), "output_padding": (0, 0), "dilation": (1, 1), "groups": 1, **case}
    kernel, groups = case.pop("kernel"), case["groups"]
    layer(
        np.random.default_rng(3),
        (2, 20, 4, 5),
        (20, 24 // groups, kernel, kernel),
        24,
        "conv2d_transpose",
        VNNI,
        **case,
    )


@pytest.mark.parametrize(("batch", "features", "units"), [(1, 64, 10), (1, 512, 1000), (5, 50, 48), (17, 33, 7)])
@pytest.mark.parametrize("out_dtype", ["uint8", "float32"])
def test_dense(batch, features, units, out_dtype):
    layer(
        np.random.default_rng(4),
        (batch, features),
        (features, units),
        units,
        "dense",
        VNNI,
        block=0,
        out_dtype=out_dtype,
    )


@pytest.mark.parametrize("seed", range(6))
def test_random_convolution(seed):
    rng = np.random.default_rng(100 + seed)
    kernel, strides = tuple(map(int, rng.integers(1, 5, 2))), tuple(map(int, rng.integers(1, 4, 2)))
    data = (int(rng.integers(1, 3)), int(rng.integers(1, 40)), int(rng.integers(5, 20)), int(rng.integers(5, 40)))
    conv(
        data,
        int(rng.integers(1, 70)),
        kernel,
        VNNI,
        seed=seed,
        strides=strides,
        padding=tuple(map(int, rng.integers(0, 3, 4))),
        residual=bool(rng.integers(2)),
    )


def test_extreme_sums_do_not_saturate():
    """All-255 data times all -128 weights: pairs leave int16, so instructions that saturate there would be caught."""
    for isa_name in EVERY_ISA:
        target, isa = target_of(isa_name)
        x, w = np.full((1, 64, 3, 3), 255, np.uint8), np.full((16, 64, 3, 3), -128, np.int8)
        constants = {"weight": w, "bias": np.zeros(16, np.int32), "scale": np.full(16, 1e-5, np.float32)}
        attrs = {"strides": (1, 1), "padding": (0, 0, 0, 0), "out_dtype": "float32"}
        kernel = conv2d((TensorSpec(x.shape, "uint8", 16),), constants, attrs, isa)
        np.testing.assert_array_equal(run_kernel(kernel, [x], target), quant.conv2d(x, *constants.values(), **attrs))


def scales_with_false_ties(count):
    """float32 scales and sums whose rounded product is a tie that the exact one is not: fused arithmetic differs."""
    rng, found = np.random.default_rng(7), []
    while len(found) < count:
        scale = rng.random(20000).astype(np.float32)
        total = rng.integers(1, 256, 20000)
        exact, rounded = total.astype(np.float64) * scale, total.astype(np.float32) * scale
        for index in np.flatnonzero((rounded % 1 == 0.5) & (np.rint(exact) != np.rint(rounded.astype(np.float64)))):
            found.append((scale[index], total[index]))
    return found[:count]


def test_product_is_rounded_before_it_is_made_an_integer():
    target, isa = target_of("avx512-vnni")
    found = scales_with_false_ties(32)
    x = np.array([total for _, total in found], np.uint8).reshape(1, 1, 4, 8)
    weight, bias = np.ones((32, 1, 1, 1), np.int8), np.zeros(32, np.int32)
    constants = {"weight": weight, "bias": bias, "scale": np.array([scale for scale, _ in found], np.float32)}
    attrs = {"strides": (1, 1), "padding": (0, 0, 0, 0)}
    kernel = conv2d((TensorSpec(x.shape, "uint8", 4),), constants, attrs, isa)
    np.testing.assert_array_equal(run_kernel(kernel, [x], target), quant.conv2d(x, *constants.values(), **attrs))
