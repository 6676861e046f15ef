"""Which schedule to simulate next: the analytic estimate, corrected by what the simulated ones taught.

The estimate misses what depends on how loads, micro-op lists and instructions meet in time. A ridge regression of
log(cycles / estimate) on the terms of the estimate and on the choices of the schedule learns that for one operator
from a few dozen simulations. Deterministic: the same observations give the same ranking.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from lpsn_tvm.schedules.vta.schedule import Schedule
    from lpsn_tvm.targets.vta.bounds import Work

Vector = npt.NDArray[np.float64]
RIDGE = 0.3
# Beyond this factor a schedule is simply bad; how bad would only distort the fit.
WORST = 1.5


def features(schedule: Schedule, work: Work) -> Vector:
    """What may explain an error of the estimate, each of the order of 1."""
    compute = work.gemm + work.resets + 2 * (work.immediate + work.tensor)
    return np.array(
        [
            1.0,
            10 * work.lists / compute,
            1000 * work.list_loads / compute,
            300 * work.instructions / compute,
            300 * work.tiles / compute,
            work.likely_inp / compute * 4,
            work.likely_wgt / compute * 64,
            work.last_out * work.tiles / max(work.out, 1) / max(work.tiles, 8),
            20 * work.chunk / 8 / compute,
            20 * work.first_inp / compute,
            work.inp_slots == 1,
            work.wgt_slots == 1,
            schedule.inner == "co",
            schedule.inner == "ci",
            schedule.threads == 2,
            schedule.order == "oc",
            (schedule.order == "oc") == (schedule.thread_axis == "oc"),
            schedule.tile_co == 1,
            schedule.tile_co == 2,
            schedule.tile_ci == 1,
            np.log2(schedule.tile_ci),
            np.log2(schedule.tile_co),
            1 / schedule.tile_w,
            1 / schedule.tile_h,
        ],
        np.float64,
    )


@dataclass
class Ranking:
    """Observations so far, and the cycles that they predict for others."""

    rows: list[Vector] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)

    def observe(self, row: Vector, estimate: float, cycles: int) -> None:
        """A schedule was simulated."""
        self.rows.append(row)
        self.errors.append(float(np.clip(np.log(cycles / estimate), -np.log(WORST), np.log(WORST))))

    def predict(self, rows: Vector, estimates: Vector) -> Vector:
        """Cycles to expect, float64[n], of schedules with features `rows`, float64[n, f]."""
        if not self.rows:
            return estimates
        known, errors = np.stack(self.rows), np.array(self.errors)
        # Good schedules matter: being right about them is worth more than about the others.
        weights = np.exp(-4 * (errors - errors.min()))[:, None]
        normal = known.T @ (weights * known) + RIDGE * np.eye(known.shape[1])
        slopes = np.linalg.solve(normal, known.T @ (weights[:, 0] * errors))
        result: Vector = estimates * np.exp(np.clip(rows @ slopes, -np.log(WORST), np.log(WORST)))
        return result
