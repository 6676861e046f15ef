"""Dispatch tables: no operator is forgotten, a target's own kernels come before the shared ones."""

from __future__ import annotations

from typing import Any

import pytest

from lpsn_tvm import float_ops, quant
from lpsn_tvm.schedules.kernel import Attrs, Constants, Inputs, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.maker import MAKER
from lpsn_tvm.schedules.rules import OPERATORS, dispatch, rules
from lpsn_tvm.targets.cuda_rules import RULES as CUDA
from lpsn_tvm.targets.llvm_rules import RULES as LLVM

DATA = TensorSpec((1, 32, 4, 4), "uint8", 16)
ATTRS = {"pad_width": (1, 1, 1, 1), "value": 0, "mode": "constant"}


@pytest.mark.parametrize("table", [LLVM, CUDA], ids=["llvm", "cuda"])
def test_every_operator_has_a_builder(table: Any) -> None:
    known = {*quant.OPERATORS, *float_ops.OPERATORS}
    assert set(table) == known
    assert set(OPERATORS) < known


def test_own_builders_are_asked_first() -> None:
    asked: list[str] = []

    def not_mine(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Any) -> Kernel | None:
        asked.append("own")
        return None

    table = rules(MAKER, {"lpsn.pad": (not_mine,), "lpsn.conv2d": (not_mine,)})
    kernel = dispatch(table, "lpsn.pad", (DATA,), {}, ATTRS, None)
    assert asked == ["own"]
    assert kernel is not None
    assert kernel.key[0] == "pad"
    assert dispatch(table, "lpsn.conv2d", (DATA,), {}, {}, None) is None
    assert dispatch(table, "lpsn.unknown", (DATA,), {}, {}, None) is None
