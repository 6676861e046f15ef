"""What the tuner asks of whoever measures (`lpsn_tvm/tuning/measure.py`, or a stand-in of a test)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lpsn_tvm.schedules.template import Config, Template

if TYPE_CHECKING:
    from lpsn_tvm.artifact import Artifact


@dataclass(frozen=True)
class Comparison:
    """Times of several configurations of one kernel, taken in turn in one process.

    Parameters
    ----------
    seconds : tuple of tuple of float
        For each configuration the seconds of one call, one value per round; empty where it could not be built or run.
    is_equal : tuple of bool
        Whether the configuration's output equals the first one's bit for bit (False where there is none).
    errors : tuple of str
        Why a configuration has no times; "" where it has.
    """

    seconds: tuple[tuple[float, ...], ...]
    is_equal: tuple[bool, ...]
    errors: tuple[str, ...]

    def median(self, index: int) -> float:
        """Median seconds of a configuration; infinite where it has no times."""
        return statistics.median(self.seconds[index]) if self.seconds[index] else float("inf")

    def ratio(self, index: int) -> float:
        """Median over the rounds of (seconds of the configuration / seconds of the first one in the same round)."""
        pairs = list(zip(self.seconds[index], self.seconds[0], strict=False))
        return statistics.median(own / first for own, first in pairs) if pairs else float("inf")


class Measurer(Protocol):
    """Builds and times configurations on one device; reads candidates with `space.read_candidate`."""

    @property
    def machine(self) -> str:
        """What a record says about where it was measured, for example "GPU NVIDIA A100, driver 550.54"."""
        ...

    def builder(self) -> Any:
        """MetaSchedule's `Builder`: makes the kernel of a candidate in a worker process."""
        ...

    def runner(self) -> Any:
        """MetaSchedule's `Runner`: times what the builder made; failures are results with an error message."""
        ...

    def compare(self, template: Template, configs: Sequence[Config], rounds: int) -> Comparison:
        """Time configurations in turn, round by round, in one process, on equal random arguments."""
        ...

    def time_networks(self, old: Artifact, new: Artifact) -> tuple[Sequence[float], Sequence[float]]:
        """Seconds per run of two modules on the device, in turn: one value per round each."""
        ...

    def close(self) -> None:
        """End worker processes."""
        ...
