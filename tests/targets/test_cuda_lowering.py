"""What lowering for GPUs refuses."""

from __future__ import annotations

from typing import Any

import pytest
from integer_network import Builder

from lpsn_tvm.errors import CompileError
from lpsn_tvm.targets import get_backend


@pytest.mark.parametrize(
    ("shape", "where"),
    [((1, 3, 32768, 32768), "x"), ((1, 5, 16384, 16384), "x"), ((3, 16, 8192, 4096), "conv")],
    ids=str,
)
def test_tensors_that_cannot_be_addressed(shape: tuple[int, ...], where: str) -> None:
    def body(net: Any) -> Any:
        return net.conv("conv", net.quantize(net.x), 32)

    mod = Builder(shape).build(body)
    with pytest.raises(CompileError, match=r"at most 2147483647 can be addressed: choose a smaller batch") as caught:
        get_backend("cuda -arch=sm_86").lower(mod)
    assert caught.value.where == where


def test_the_largest_tensor_is_taken() -> None:
    mod = Builder((1, 4, 32768, 16383)).build(lambda net: net.quantize(net.x))
    assert get_backend("cuda -arch=sm_86").lower(mod) is not None
