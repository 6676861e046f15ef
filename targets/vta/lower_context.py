"""State of one lowering: which variables are on the accelerator and in which form, which on the host, and what has been
emitted. Rules (`lower_*.py`) read and extend it.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lpsn_tvm.errors import LpsnError
from lpsn_tvm.schedules.vta.ops import Gemm, Plane, Step, Store, TileOp
from lpsn_tvm.targets.vta.forms import Form, Image, Value
from lpsn_tvm.targets.vta.integer_graph import IntegerGraph, Node
from lpsn_tvm.targets.vta.layout import TileLayout, ceil_div, image_shape
from lpsn_tvm.targets.vta.network import HostStep, SymbolicTensor
from lpsn_tvm.targets.vta.weights import ConstantPool

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig


class Unmapped(LpsnError):
    """An operator, or this use of it, has no mapping; the message is the reason that the report gives."""


@dataclass(frozen=True)
class Placement:
    """Where a tensor lies inside a larger one: first tile, and the distance between its batches."""

    region: str
    base: int
    batch_stride: int


@dataclass
class Context:
    """Everything that grows while the graph is walked.

    Parameters
    ----------
    graph : IntegerGraph
    config : VtaConfig
    pool : ConstantPool
    shapes : dict
        Shape of every variable so far.
    ranges : dict
        (low, high) of every integer variable so far.
    values : dict
        Variables on the accelerator.
    on_host : set
        Variables that the host holds or has been told to fetch.
    host_made : set
        Variables that the host has made.
    placed : dict
        Tensors that lie inside others (operands of concatenations).
    fused : set
        Operators that an earlier one has done already.
    renaming : dict
        Operators that only rename elements; the host does them itself where it reads their variables.
    """

    graph: IntegerGraph
    config: VtaConfig
    pool: ConstantPool
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    on_host: set[str] = field(default_factory=set)
    host_made: set[str] = field(default_factory=set)
    tensors: dict[str, SymbolicTensor] = field(default_factory=dict)
    steps: list[TileOp | HostStep] = field(default_factory=list)
    placed: dict[str, Placement] = field(default_factory=dict)
    fused: set[str] = field(default_factory=set)
    renaming: dict[str, Node] = field(default_factory=dict)

    def snapshot(self) -> Context:
        """A copy to go back to; constants may stay."""
        fields = (name for name in self.__dataclass_fields__ if name not in ("graph", "config", "pool"))
        return replace(self, **{name: copy(getattr(self, name)) for name in fields})

    def restore(self, saved: Context) -> None:
        """Undo everything since `saved`."""
        self.__dict__.update(saved.__dict__)

    # --- extents
    @property
    def block(self) -> int:
        """Lanes per tile."""
        return self.config.block_in

    def batches(self, images: int) -> int:
        """Tiles along N."""
        return ceil_div(images, self.config.batch)

    def fits(self, name: str) -> bool:
        """Whether the variable's integers fit an input tile."""
        low, high = self.ranges.get(name, (-128, 127))
        limit = 1 << (self.config.inp_bits - 1)
        return -limit <= low and high < limit

    def image(self, name: str) -> Image:
        """NCHW of a variable."""
        shape = self.shapes[name]
        if not 2 <= len(shape) <= 4:
            raise Unmapped(f"a tensor of shape {shape} has no tile layout")
        return image_shape(shape)

    # --- variables on the accelerator
    def value(self, name: str) -> Value:
        """The variable, packed by the host in plain form if it is not there yet.

        Raises
        ------
        Unmapped
            It is not an int8 tensor whose integers fit the hardware.
        """
        if name not in self.values:
            if name not in self.ranges:
                raise Unmapped("its operand is not an integer tensor")
            if not self.fits(name):
                low, high = self.ranges[name]
                raise Unmapped(f"its operand holds {low}..{high}, more than {self.config.inp_bits} bits")
            value = self.plain_value(name, name, self.image(name), *self.ranges[name])
            self.tensors[name] = SymbolicTensor(name, self.layout(self.shapes[name]))
            self.values[name] = value
        return self.values[name]

    def layout(self, shape: tuple[int, ...], planes: int = 1) -> TileLayout:
        """Plain layout of a shape."""
        return TileLayout(shape, self.config.batch, self.block, self.config.out_bits, planes)

    def plain_value(self, name: str, region: str, image: Image, low: int, high: int) -> Value:
        """A variable that has a whole region to itself, in plain form."""
        n, c, height, width = image
        plane = Plane.dense(region, 0, self.batches(n), ceil_div(c, self.block), height, width)
        return Value(name, image, plane, Form.plain(c, self.block), low, high)

    def new_tensor(self, node: Node, low: int, high: int) -> Value:
        """A plain tensor for the result of `node`, in a region of its name."""
        self.tensors[node.name] = SymbolicTensor(node.name, self.layout(node.shape))
        value = self.plain_value(node.name, node.name, image_shape(node.shape), low, high)
        self.define(node, value)
        return value

    def new_region(self, name: str, value: str, shape: tuple[int, ...]) -> str:
        """A tensor that is no variable's own; returns its unique name."""
        unique = self.unused_name(name)
        self.tensors[unique] = SymbolicTensor(value, self.layout(shape))
        return unique

    def unused_name(self, name: str) -> str:
        """`name`, numbered if a tensor or a variable has it."""
        unique, count = name, 1
        while unique in self.tensors or unique in self.graph.consumers:
            unique, count = f"{name}.{count}", count + 1
        return unique

    def define(self, node: Node, value: Value) -> None:
        """`node` is done on the accelerator: its variable is `value`."""
        self.values[node.name] = value
        self.shapes[node.name] = node.shape
        self.ranges[node.name] = (value.low, value.high)

    def define_view(self, node: Node, value: Value) -> None:
        """`node` only renames elements: its variable is another reading of tiles that are there."""
        self.define(node, value)
        self.renaming[node.name] = node

    def emit(self, op: TileOp | HostStep) -> None:
        """Append a step."""
        self.steps.append(op)

    # --- placement
    def is_placeable(self, value: Value) -> bool:
        """Whether the tensor may become a part of another: whole, written here, and nobody fetches it."""
        plane = value.plane
        tensor = self.tensors.get(plane.region)
        is_written = any(
            isinstance(step, Store) and step.plane.region == plane.region
            for op in self.steps
            if isinstance(op, TileOp)
            for step in op.steps
        )
        return (
            tensor is not None
            and is_written
            and plane.tiles == tensor.layout.tiles
            and plane.region not in self.placed
            and tensor.value not in self.on_host
        )

    def place(self, region: str, placement: Placement) -> None:
        """Let `region` lie inside another tensor."""
        self.placed[region] = placement
        del self.tensors[region]

    def resolved(self, plane: Plane) -> Plane:
        """The plane where its tensor finally lies."""
        while plane.region in self.placed:
            target = self.placed[plane.region]
            plane = replace(
                plane, region=target.region, base=target.base + plane.base, batch_stride=target.batch_stride
            )
        return plane

    def resolved_steps(self) -> tuple[TileOp | HostStep, ...]:
        """All steps, their planes where the tensors finally lie."""
        return tuple(
            replace(op, steps=tuple(self._resolved_step(step) for step in op.steps)) if isinstance(op, TileOp) else op
            for op in self.steps
        )

    def _resolved_step(self, step: Step) -> Step:
        if isinstance(step, Gemm):
            return replace(step, source=self.resolved(step.source))
        return replace(step, plane=self.resolved(step.plane)) if isinstance(step, Store) else step
