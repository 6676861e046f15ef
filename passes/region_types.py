"""What the region finder returns: which tensors exist as integers, and what is computed between two of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

RegionKind = Literal["layer", "add", "multiply", "lookup", "same", "pool", "concat", "float"]


@dataclass(frozen=True)
class Region:
    """One integer operator, or one float node.

    Parameters
    ----------
    kind : RegionKind
        layer | add | multiply | lookup | same | pool | concat | float.
    name : str
        Variable that the region produces.
    inputs : tuple of str
        Variables that it reads: (data,) or (data, residual) for a layer, operands in order for add, multiply and
        concat.
    members : tuple of str
        Bound variables in execution order; the last is `name`.
    layer : str, optional
        Layer name (kind "layer").
    activation : (low, high), optional
        Clamp in real numbers, applied last; `low` may be -inf and `high` inf.
    residual : str, optional
        The other addend (kind "layer").
    per_channel : bool
        A lookup with one table per channel.
    float_output : bool
        The result is float32 (kind "float", and a layer that only float nodes or the network's outputs read).
    reason : str
        Why it is float.
    """

    kind: RegionKind
    name: str
    inputs: tuple[str, ...]
    members: tuple[str, ...]
    layer: str | None = None
    activation: tuple[float, float] | None = None
    residual: str | None = None
    per_channel: bool = False
    float_output: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Regions:
    """The regions of a function in execution order, and the variables that exist as integers.

    Parameters
    ----------
    regions : tuple of Region
        Ordered so that each one's inputs exist before it.
    quantized : tuple of str
        Variables with QuantParams: function inputs first, then in execution order. A variable produced in float and
        read by integer operators is among them.
    shares : mapping
        Variable -> the variable whose QuantParams it has (kind "same"), resolved to the first one.
    inputs, outputs : tuple of str
        The function's parameters and the variables that it returns.
    """

    regions: tuple[Region, ...]
    quantized: tuple[str, ...]
    shares: Mapping[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    by_name: Mapping[str, Region] = field(init=False, repr=False, compare=False)
    by_layer: Mapping[str, Region] = field(init=False, repr=False, compare=False)
    _quantized: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {region.name: region for region in self.regions})
        object.__setattr__(
            self, "by_layer", {region.layer: region for region in self.regions if region.layer is not None}
        )
        object.__setattr__(self, "_quantized", frozenset(self.quantized))

    def is_quantized(self, name: str) -> bool:
        """Whether variable `name` exists as integers."""
        return name in self._quantized

    def source(self, name: str) -> str:
        """The variable whose QuantParams `name` has: itself, or where a chain of scale-preserving operators began."""
        return self.shares.get(name, name)

    @property
    def float_nodes(self) -> dict[str, str]:
        """Variable -> reason of everything that is computed in float, for the report."""
        return {region.name: region.reason for region in self.regions if region.kind == "float"}

    def readers(self) -> dict[str, list[Region]]:
        """Variable -> regions that read it, in order."""
        table: dict[str, list[Region]] = {}
        for region in self.regions:
            for name in dict.fromkeys(region.inputs):
                table.setdefault(name, []).append(region)
        return table
