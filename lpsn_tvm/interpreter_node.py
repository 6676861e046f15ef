"""What the translation of one graph node to torch may know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lpsn_tvm.errors import UnsupportedOpError

Function = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Node:
    """What a factory may know of a node: `attrs`, the traced shapes of its operands and of its result."""

    name: str
    op: str
    attrs: dict[str, Any]
    in_shapes: tuple[tuple[int, ...], ...]
    shape: tuple[int, ...]

    def refuse(self, why: str) -> UnsupportedOpError:
        """The error for a variant of an operator that this interpreter does not evaluate."""
        return UnsupportedOpError(f"operator {self.op}: {why}", where=self.name)
