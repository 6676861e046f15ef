"""Templates whose times are a formula, and a measurer that knows it: the tuner without compilers, clocks and noise."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lpsn_tvm.schedules.kernel import Kernel, TensorSpec
from lpsn_tvm.schedules.template import Config, Template, canonical
from lpsn_tvm.tuning.measurer import Comparison
from lpsn_tvm.tuning.space import read_candidate
from lpsn_tvm.tuning.tasks import Task

DEVICE = "synthetic"


def template(size: int = 1, default: Config | None = None) -> Template:
    """Three knobs, 4 x 14 x 6 values; products of the first two above 28 are invalid."""
    spec = TensorSpec((1, 16, 4, 4), "uint8", 16)

    def make(config: Config) -> Kernel:
        return Kernel(lambda: None, (np.zeros(4, np.int8),), spec, ("synthetic", canonical(config)), (spec,))

    def features(config: Config) -> tuple[float, ...]:
        return float(config["rows"]), float(config["columns"]), float("abcdef".index(str(config["order"])))

    return Template(
        "synthetic", {"size": size}, {"rows": (1, 2, 3, 4), "columns": tuple(range(1, 15)), "order": tuple("abcdef")},
        default or {"rows": 1, "columns": 1, "order": "a"}, make,
        lambda config: int(config["rows"]) * int(config["columns"]) <= 28, features,
    )  # fmt: skip


def task(size: int = 1, uses: int = 1, default: Config | None = None) -> Task:
    return Task(template(size, default), tuple(f"layer{size}.{i}" for i in range(uses)))


def seconds_of(size: int, config: Config) -> float:
    """Fastest at rows 2, columns 2 + size, order e."""
    far = abs(int(config["rows"]) - 2) + 0.3 * abs(int(config["columns"]) - 2 - size)
    return 1e-3 * size * (1 + far + 0.2 * abs("abcdef".index(str(config["order"])) - 4))


BEST = {size: {"rows": 2, "columns": 2 + size, "order": "e"} for size in range(1, 12)}


@dataclass
class SyntheticMeasurer:
    """A `Measurer`; `on_trial` is called for every configuration that is run."""

    seconds: Callable[[int, Config], float] = seconds_of
    on_trial: Callable[[Config], None] = lambda config: None
    is_wrong: Callable[[Config], bool] = lambda config: False
    trials: list[tuple[int, Config]] = field(default_factory=list)
    comparisons: list[Sequence[Config]] = field(default_factory=list)
    machine: str = "formula"

    def builder(self):
        from tvm.ir.utils import derived_object
        from tvm.s_tir import meta_schedule as ms

        @derived_object
        class Build(ms.builder.PyBuilder):
            def build(self, build_inputs):
                return [ms.builder.BuilderResult(self._write(read_candidate(i.mod)), None) for i in build_inputs]

            def _write(self, candidate):
                # A folder of its own: MetaSchedule removes the folder of what was measured.
                path = Path(tempfile.mkdtemp(prefix="lpsn_tvm_")) / "candidate.json"
                path.write_text(canonical([candidate.workload.get("size", 1), dict(candidate.config)]))
                return str(path)

        return Build()

    def runner(self):
        from tvm.ir.utils import derived_object
        from tvm.s_tir import meta_schedule as ms

        measurer = self

        @derived_object
        class Run(ms.runner.PyRunner):
            def run(self, runner_inputs):
                return [self._one(*json.loads(Path(item.artifact_path).read_text())) for item in runner_inputs]

            def _one(self, size, config):
                measurer.on_trial(config)
                measurer.trials.append((size, config))
                seconds = measurer.seconds(size, config)
                result = ms.runner.RunnerResult(
                    [seconds] if math.isfinite(seconds) else None, None if math.isfinite(seconds) else "failed"
                )
                return ms.runner.RunnerFuture(lambda: True, lambda: result)

        return Run()

    def compare(self, template: Template, configs: Sequence[Config], rounds: int) -> Comparison:
        self.comparisons.append(configs)
        size = int(template.workload.get("size", 1))
        seconds = tuple((self.seconds(size, config),) * rounds for config in configs)
        return Comparison(seconds, tuple(not self.is_wrong(c) for c in configs), ("",) * len(configs))

    def close(self) -> None:
        pass
