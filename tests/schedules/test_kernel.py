"""The kernel contract's memory layouts."""

import numpy as np
import pytest

from lpsn_tvm.schedules.kernel import TensorSpec


@pytest.mark.parametrize(
    ("shape", "block", "memory"),
    [
        ((2, 20, 3, 5), 16, (2, 2, 3, 5, 16)),
        ((1, 3, 4, 4), 4, (1, 1, 4, 4, 4)),
        ((2, 20, 3, 5), 0, (2, 20, 3, 5)),
        ((3, 33), 16, (3, 3, 16)),
        ((7,), 0, (7,)),
    ],
)
def test_memory_shape_and_roundtrip(shape, block, memory):
    spec = TensorSpec(shape, "int32", block)
    assert spec.memory_shape == memory
    array = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    packed = spec.pack(array)
    assert packed.shape == memory
    np.testing.assert_array_equal(spec.unpack(packed), array)


def test_pack_puts_channel_c_into_block_c_div_b_lane_c_mod_b():
    spec = TensorSpec((1, 20, 2, 2), "int32", 16)
    packed = spec.pack(np.arange(80, dtype=np.int32).reshape(1, 20, 2, 2))
    assert packed[0, 1, 0, 1, 3] == 19 * 4 + 1
    assert not packed[0, 1, :, :, 4:].any()
