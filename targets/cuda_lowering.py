"""Lowering to GPU kernels."""

from __future__ import annotations

from typing import Any

from lpsn_tvm.schedules.cuda.convert import relayout
from lpsn_tvm.targets.kernel_lowering import lower_to_kernels


def lower(backend: Any, mod: Any) -> Any:
    """`lpsn.*` calls -> `call_tir` of kernels; see `Backend.lower`."""
    return lower_to_kernels(backend, mod, relayout)
