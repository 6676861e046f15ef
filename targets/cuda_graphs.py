"""A program's launches as CUDA graphs: built node by node, kept per set of addresses of inputs and outputs, and moved
to other addresses by changing only the nodes that touch them.

Built and not recorded: recording a stream ("capture") is at odds with what other threads do at that time.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from lpsn_tvm.targets.cuda_driver import Driver
from lpsn_tvm.targets.cuda_entry_points import POINTER, U64, KernelNode
from lpsn_tvm.targets.cuda_errors import DriverError
from lpsn_tvm.targets.cuda_program import CudaProgram, KernelLaunch, Place

KEPT_GRAPHS = 8
"""Sets of addresses that are kept: a caller whose tensors come back at the same places pays for one launch only."""

Addresses = tuple[int, ...]
"""Of inputs, then of outputs."""


class PreparedLaunch:
    """One launch in the form that the driver wants, its pointers ready to change.

    Parameters
    ----------
    launch : KernelLaunch
    function : int
        The kernel.
    fixed : (place) -> address or None
        Where a buffer lies; None where that is up to the caller.
    caller : mapping of Place to int
        Position in `Addresses` of what is up to the caller.
    """

    def __init__(
        self, launch: KernelLaunch, function: int, fixed: Callable[[Place], int | None], caller: Mapping[Place, int]
    ) -> None:
        self.launch = launch
        count = len(launch.arguments)
        self.values = (U64 * count)(*(fixed(place) or 0 for place in launch.arguments))
        self.moving = tuple(
            (index, caller[place]) for index, place in enumerate(launch.arguments) if fixed(place) is None
        )
        start = ctypes.addressof(self.values)
        self._pointers = (POINTER * count)(*range(start, start + 8 * count, 8))
        self.node = KernelNode(
            function, launch.grid, launch.block, launch.shared_bytes, self._pointers, None, None, None
        )

    def point_to(self, addresses: Addresses) -> None:
        """Set the pointers that are up to the caller."""
        for index, position in self.moving:
            self.values[index] = addresses[position]


def prepare(
    program: CudaProgram, functions: Mapping[str, int], arena: int, constants: int
) -> tuple[PreparedLaunch, ...]:
    """The launches of a program whose arena and constants lie at these addresses."""
    caller = caller_places(program)

    def fixed(place: Place) -> int | None:
        if place in caller:
            return None
        return (arena if place.region == "arena" else constants) + place.offset

    return tuple(PreparedLaunch(launch, functions[launch.kernel], fixed, caller) for launch in program.launches)


def caller_places(program: CudaProgram) -> dict[Place, int]:
    """Buffers that may lie in the caller's memory -> position in `Addresses`: all inputs, and the outputs that share
    no byte with another buffer (planning gives each memory of its own).
    """
    used = {place for launch in program.launches for place in launch.arguments}
    found = {place: place.offset for place in used if place.region == "input"}
    for index, port in enumerate(program.outputs):
        place = port.place
        is_alone = not any(_overlap(place, other) for other in used if other != place)
        if place.region == "arena" and place in used and is_alone:
            found.setdefault(place, len(program.inputs) + index)
    return found


def copied_outputs(program: CudaProgram) -> tuple[int, ...]:
    """Outputs that no launch can write in place: inputs or constants handed on, and outputs that appear twice."""
    written = set(caller_places(program).values())
    first = len(program.inputs)
    return tuple(index for index in range(len(program.outputs)) if first + index not in written)


def _overlap(one: Place, other: Place) -> bool:
    return (
        one.region == other.region and one.offset < other.offset + other.size and other.offset < one.offset + one.size
    )


class _Graph:
    """One executable graph and the addresses it works on."""

    def __init__(self, driver: Driver, launches: Sequence[PreparedLaunch], taken: list[tuple[str, int]]) -> None:
        graph = driver.graph()
        taken.append(("cuGraphDestroy", graph))
        self._driver = driver
        self.nodes: list[int] = []
        for launch in launches:
            self.nodes.append(driver.add_kernel(graph, self.nodes[-1] if self.nodes else None, launch.node))
        self.executable = driver.instantiate(graph)
        # The graph stays: its nodes name those of the executable.
        taken.append(("cuGraphExecDestroy", self.executable))


class Graphs:
    """The graphs of one program.

    Parameters
    ----------
    driver : Driver
    launches : sequence of PreparedLaunch
    taken : list
        Grows by what has to be given back.
    """

    def __init__(self, driver: Driver, launches: Sequence[PreparedLaunch], taken: list[tuple[str, int]]) -> None:
        self._driver, self.launches, self._taken = driver, launches, taken
        self._graphs: OrderedDict[Addresses, _Graph] = OrderedDict()

    def run_stepwise(self, addresses: Addresses, stream: int) -> None:
        """Launch one kernel after the other and wait for each, to learn which one fails.

        Raises
        ------
        DriverError
            Names the layer and the kernel.
        """
        for prepared in self.launches:
            try:
                self.launch_alone(prepared, addresses, stream)
                self._driver.synchronize(stream)
            except DriverError as error:
                launch = prepared.launch
                message = f"layer {launch.name!r}, kernel {launch.kernel}: {error.message}"
                raise DriverError(error.status, message, "cuLaunchKernel") from error

    def launch_alone(self, prepared: PreparedLaunch, addresses: Addresses, stream: int) -> None:
        """One launch, without a graph."""
        prepared.point_to(addresses)
        launch = prepared.launch
        self._driver.launch(
            int(prepared.node.function), launch.grid, launch.block, launch.shared_bytes, stream, tuple(prepared.values)
        )

    def executable(self, addresses: Addresses) -> int:
        """The graph that works on these addresses."""
        graph = self._graphs.get(addresses)
        if graph is None:
            with self._driver.relaxed():
                graph = self._moved(addresses) if len(self._graphs) >= KEPT_GRAPHS else self._built(addresses)
            self._graphs[addresses] = graph
        elif len(self._graphs) > 1:
            self._graphs.move_to_end(addresses)
        return graph.executable

    def _built(self, addresses: Addresses) -> _Graph:
        for launch in self.launches:
            launch.point_to(addresses)
        return _Graph(self._driver, self.launches, self._taken)

    def _moved(self, addresses: Addresses) -> _Graph:
        """The graph that was not used for longest, moved: a few calls where building one takes hundreds."""
        before, graph = self._graphs.popitem(last=False)
        for launch, node in zip(self.launches, graph.nodes, strict=True):
            if any(before[position] != addresses[position] for _, position in launch.moving):
                launch.point_to(addresses)
                self._driver.set_kernel(graph.executable, node, launch.node)
        return graph
