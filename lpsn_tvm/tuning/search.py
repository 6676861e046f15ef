"""What is measured next: MetaSchedule's evolutionary search within a budget, and nothing twice."""

from __future__ import annotations

import itertools
import random
from typing import Any

from lpsn_tvm.schedules.template import Config, canonical
from lpsn_tvm.tuning.control import Control
from lpsn_tvm.tuning.space import annotate, read_config
from lpsn_tvm.tuning.tasks import Task

BATCH = 8
"""Trials that are built and timed together."""

MOST_ENUMERATED = 20_000
"""Larger spaces are not gone through from end to end."""

POPULATION, GENERATIONS = 64, 3
"""Spaces have hundreds of configurations, not the millions that the defaults (512, 4; 20 s a batch) are made for."""


def search_strategy(task: Task, control: Control, seen: set[str], seed: int) -> Any:
    """MetaSchedule's `EvolutionarySearch`, stopped by the budget.

    Around it: spaces of a few batches are tried whole; what an earlier run has measured is left out; where the
    evolution finds nothing new (it draws with replacement, so the end of a small space escapes it), what is left is
    drawn without.

    Parameters
    ----------
    task : Task
        Whose configurations are searched.
    control : Control
        Says how many trials are left.
    seen : set of str
        Canonical text of configurations that were measured before.
    seed : int
        Of what is drawn.
    """
    from tvm.ir.utils import derived_object
    from tvm.s_tir import meta_schedule as ms

    evolution = ms.search_strategy.EvolutionarySearch(
        population_size=POPULATION,
        init_min_unmeasured=BATCH,
        max_fail_count=20,
        genetic_num_iters=GENERATIONS,
        eps_greedy=0.15,
    )
    generator = random.Random(seed)

    @derived_object
    class WithinBudget(ms.search_strategy.PySearchStrategy):  # type: ignore[misc]
        """Hands out what may still be measured."""

        def _initialize_with_tune_context(self, context: Any) -> None:
            self.mod = context.mod
            evolution._initialize_with_tune_context(context)

        def pre_tuning(
            self, max_trials: int, num_trials_per_iter: int, design_spaces: Any, database: Any, cost_model: Any
        ) -> None:
            """Prepare the evolution, unless the space is small enough to be tried whole."""
            some = itertools.islice(task.template.configs(), 2 * BATCH + 1)
            self.evolves = sum(1 for _ in some) > 2 * BATCH
            if self.evolves:
                evolution.pre_tuning(1 << 30, num_trials_per_iter, design_spaces, database, cost_model)

        def post_tuning(self) -> None:
            """Free the evolution's population."""
            if self.evolves:
                evolution.post_tuning()

        def generate_measure_candidates(self) -> Any:
            """The next batch; None where budget or space are used up."""
            wanted = min(BATCH, control.left())
            chosen = self._evolved(wanted) if wanted and self.evolves else []
            if wanted and not chosen:
                chosen = [candidate_of(self.mod, task, config) for config in _unseen(task, seen, generator, wanted)]
            seen.update(_text(task, candidate) for candidate in chosen)
            control.start(len(chosen))
            return chosen or None

        def _evolved(self, wanted: int) -> list[Any]:
            for _ in range(3):
                candidates = evolution.generate_measure_candidates()
                if candidates is None:
                    # It has given up and would do so again.
                    self.evolves = False
                    evolution.post_tuning()
                    return []
                new = [candidate for candidate in candidates if _text(task, candidate) not in seen]
                if new:
                    return new[:wanted]
            return []

        def notify_runner_results(self, measure_candidates: Any, results: Any) -> None:
            """The evolution counts its trials."""
            if self.evolves:
                evolution.notify_runner_results(measure_candidates, results)

        def clone(self) -> Any:
            """Not cloned: it belongs to one run."""
            raise NotImplementedError

    return WithinBudget()


def candidate_of(mod: Any, task: Task, config: Config) -> Any:
    """MetaSchedule's `MeasureCandidate` of a configuration."""
    from tvm import s_tir
    from tvm.s_tir import meta_schedule as ms

    sch = s_tir.Schedule(mod)
    annotate(sch, task.template, config)
    return ms.MeasureCandidate(sch, ms.arg_info.ArgInfo.from_prim_func(mod["main"]))


def _text(task: Task, candidate: Any) -> str:
    return canonical(read_config(candidate.sch, task.template.choices))


def _unseen(task: Task, seen: set[str], generator: random.Random, count: int) -> list[Config]:
    configs = itertools.islice(task.template.configs(), MOST_ENUMERATED)
    left: list[Config] = [config for config in configs if canonical(config) not in seen]
    return generator.sample(left, min(count, len(left)))
