"""quantize, dequantize, requantize and layout conversion equal `quant.py` bit for bit in every pair of layouts."""

import numpy as np
import pytest
from int8_kernels import run_kernel, target_of

from lpsn_tvm import quant
from lpsn_tvm.schedules.kernel import TensorSpec
from lpsn_tvm.schedules.llvm.convert import dequantize, quantize, relayout, requantize

SHAPES = [(2, 3, 5, 7), (1, 1, 28, 28), (1, 20, 5, 7), (2, 6, 3, 2), (1, 32, 4, 4), (3, 40), (1, 7)]


def ids(shape):
    return "x".join(map(str, shape))


@pytest.mark.parametrize("isa_name", ["avx512-vnni", "avx2", "generic"])
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_quantize(shape, isa_name):
    target, isa = target_of(isa_name)
    x = (np.random.default_rng(0).standard_normal(shape) * 8).astype(np.float32)
    x.reshape(-1)[:4] = [0.5 / 20, 1.5 / 20, -1e30, np.inf]
    attrs = {"inv_scale": 20.0, "zero_point": 100, "qmin": 0, "qmax": 255, "out_dtype": "uint8"}
    kernel = quantize((TensorSpec(shape, "float32"),), {}, attrs, isa)
    np.testing.assert_array_equal(run_kernel(kernel, [x], target), quant.quantize(x, **attrs))


@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_dequantize_and_requantize(shape, block):
    target, isa = target_of("generic")
    q = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    spec = TensorSpec(shape, "uint8", block)
    attrs = {"scale": 0.037, "zero_point": 100}
    np.testing.assert_array_equal(
        run_kernel(dequantize((spec,), {}, attrs, isa), [q], target), quant.dequantize(q, **attrs)
    )
    attrs = {
        "multiplier": 0.37,
        "in_zero_point": 100,
        "out_zero_point": -3,
        "qmin": -20,
        "qmax": 31,
        "out_dtype": "int8",
    }
    np.testing.assert_array_equal(
        run_kernel(requantize((spec,), {}, attrs, isa), [q], target), quant.requantize(q, **attrs)
    )


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("blocks", [(0, 16), (16, 0), (4, 16), (0, 4)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_relayout(shape, blocks, dtype):
    target, _ = target_of("generic")
    x = np.random.default_rng(2).integers(0, 256, shape).astype(dtype)
    kernel = relayout(TensorSpec(shape, dtype, blocks[0]), TensorSpec(shape, dtype, blocks[1]))
    np.testing.assert_array_equal(run_kernel(kernel, [x], target), x)
