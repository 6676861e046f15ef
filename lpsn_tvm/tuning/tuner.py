"""`tune`: measure configurations of a network's kernels within a budget, and record those that beat the default.

Defaults are measured first. Then MetaSchedule's gradient scheduler hands out batches to the tasks (one per distinct
template), each searched by evolution with one cost model for all. At the end the best few of each task are compared
with its default in turn. Everything is in a directory from which a killed run goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from lpsn_tvm.budget import Budget
from lpsn_tvm.compat import check_versions, numpy_seed, quiet_metaschedule, without_tensor_intrinsics
from lpsn_tvm.progress import ProgressCallback, show_detail, silent
from lpsn_tvm.records import Record, Records
from lpsn_tvm.schedules.template import Config, canonical
from lpsn_tvm.targets.backend import Backend
from lpsn_tvm.tuning.control import Control
from lpsn_tvm.tuning.cost_model import check_xgboost, cost_model
from lpsn_tvm.tuning.finals import FINALISTS, finals, record_of
from lpsn_tvm.tuning.measurer import Measurer
from lpsn_tvm.tuning.search import BATCH, MOST_ENUMERATED, candidate_of, search_strategy
from lpsn_tvm.tuning.space import read_config, space_generator
from lpsn_tvm.tuning.tasks import Task, extract
from lpsn_tvm.tuning.trials import State, Trial, Trials

ACCEPTED = "records.json"
"""In the directory: what the finals accepted so far."""


class TuningInterrupted(KeyboardInterrupt):
    """Ctrl-C; says what is kept and how to go on."""


def tune(
    backend: Backend,
    mod: Any,
    budget: Budget,
    directory: Path,
    measurer: Measurer,
    progress: ProgressCallback = silent,
    *,
    seed: int = 0,
) -> Records:
    """Records of the kernels of a network that are faster than their defaults on the measurer's device.

    Parameters
    ----------
    backend : Backend
        Its device is what is tuned for.
    mod : IRModule
        The network as `backend.build` takes it.
    budget : Budget
        Trials that an earlier run in this directory has finished, and the time it took, count.
    directory : Path
        Holds trials, verdicts and records; made where it is missing.
    measurer : Measurer
        Of the backend's device.
    progress : callable (stage, done, total)
        One stage for all and one per task.
    seed : int
        Of the search.

    Raises
    ------
    TuningError
        The cost model's library is missing, or the directory cannot be used.
    TuningInterrupted
        Ctrl-C.
    """
    check_versions()
    check_xgboost()
    tasks = extract(backend, mod)
    known = backend.records
    return tune_tasks(tasks, backend.device, budget, directory, measurer, progress, seed=seed, known=known)


def tune_tasks(
    tasks: Sequence[Task],
    device: str,
    budget: Budget,
    directory: Path,
    measurer: Measurer,
    progress: ProgressCallback = silent,
    *,
    seed: int = 0,
    known: Records | None = None,
) -> Records:
    """`tune` of given tasks; configurations of known records are tried first."""
    if not tasks:
        return Records()
    run = _Run(tasks, device, budget, directory, measurer, progress, seed)
    try:
        with run.control.interruptible(), quiet_metaschedule(), numpy_seed(seed), without_tensor_intrinsics():
            run.measure_first(known or Records())
            run.search()
            run.save_time()
        if run.control.is_interrupted:
            raise KeyboardInterrupt
        return run.decide()
    except KeyboardInterrupt as error:
        raise TuningInterrupted(
            f"{run.trials.count} trials are kept in {directory}; the same command with the same directory goes on from "
            "there"
        ) from error
    finally:
        run.trials.close()


class _Run:
    """One call of `tune`."""

    def __init__(
        self,
        tasks: Sequence[Task],
        device: str,
        budget: Budget,
        directory: Path,
        measurer: Measurer,
        progress: ProgressCallback,
        seed: int,
    ) -> None:
        self.tasks, self.device, self.directory = list(tasks), device, directory
        self.measurer, self.progress, self.seed = measurer, progress, seed
        self.trials = Trials(directory, device, tasks)
        self.state = State(directory)
        self.key = _digest(device, *sorted(task.template.key for task in tasks))
        spent = float(self.state.get("seconds", self.key) or 0.0)
        self.control = Control(budget, self.trials.count, spent, progress)
        self._sizes: dict[str, int] = {}

    def measure_first(self, known: Records) -> None:
        """Measure defaults and known records that were not yet, and sort the tasks: those that take most of the
        network first.
        """
        from tvm.s_tir import meta_schedule as ms

        missing = [(task, config) for task in self.tasks for config in self._first(task, known)]
        builder, runner = self.measurer.builder(), self.measurer.runner()
        for start in range(0, len(missing), BATCH):
            if self.control.is_interrupted:
                return
            batch = missing[start : start + BATCH]
            chosen = [candidate_of(self.trials.modules[t.template.key], t, config) for t, config in batch]
            self.control.start(len(batch))
            built = builder.build([ms.builder.BuilderInput(c.sch.mod, _target()) for c in chosen])
            results = _run(runner, chosen, built)
            for (task, config), seconds in zip(batch, results, strict=True):
                self.trials.write(task, Trial(config, seconds))
            self.control.show()
        self.tasks.sort(key=self._share, reverse=True)

    def _first(self, task: Task, known: Records) -> list[Config]:
        """Default and known configuration of a task, as far as they have not been measured."""
        record = known.find(self.device, task.template)
        wanted: list[Config] = [task.template.default] + ([record.config] if record else [])
        seen = {canonical(trial.config) for trial in self.trials.of(task)}
        return [config for config in wanted if canonical(config) not in seen]

    def _share(self, task: Task) -> float:
        """Seconds that the network spends in a task by default."""
        default = self.trials.default(task)
        return task.uses * default.seconds if default is not None and math.isfinite(default.seconds) else 0.0

    def search(self) -> None:
        """Spend the budget; the scheduler's weight is the number of uses, and it multiplies by the time itself."""
        from tvm.s_tir import meta_schedule as ms

        if not self.control.left():
            return
        model = cost_model(self.tasks, self.seed)
        contexts = [self._context(task, self.seed + index) for index, task in enumerate(self.tasks)]
        self._teach(model, contexts)
        self._sizes = {
            t.template.key: sum(1 for _ in islice(t.template.configs(), MOST_ENUMERATED)) for t in self.tasks
        }
        for task in self.tasks:
            self._show(task)
        callbacks = [
            self._listener(),
            ms.measure_callback.AddToDatabase(),
            ms.measure_callback.UpdateCostModel(),
            ms.measure_callback.RemoveBuildArtifact(),
        ]
        ms.task_scheduler.GradientBased(seed=self.seed + 1).tune(
            contexts,
            [float(task.uses) for task in self.tasks],
            1 << 30,
            1 << 30,
            BATCH,
            self.measurer.builder(),
            self.measurer.runner(),
            callbacks,
            self.trials.database,
            model,
        )

    def _context(self, task: Task, seed: int) -> Any:
        from tvm.s_tir import meta_schedule as ms

        seen = {canonical(trial.config) for trial in self.trials.of(task)}
        return ms.TuneContext(
            self.trials.modules[task.template.key],
            target=_target(),
            space_generator=space_generator(task.template, seed),
            search_strategy=search_strategy(task, self.control, seen, seed),
            task_name=task.template.key,
            rand_state=seed + 1,
            # Postprocessor, mutator and features are Python: threads would only wait for each other.
            num_threads=1,
        )

    def _teach(self, model: Any, contexts: Sequence[Any]) -> None:
        """Trials of earlier runs, and the defaults, for the cost model."""
        from tvm.s_tir import meta_schedule as ms

        for task, context in zip(self.tasks, contexts, strict=True):
            known = [trial for trial in self.trials.of(task) if math.isfinite(trial.seconds)]
            if known:
                candidates = [candidate_of(context.mod, task, trial.config) for trial in known]
                results = [ms.runner.RunnerResult([trial.seconds], None) for trial in known]
                model.update(context, candidates, results)

    def _listener(self) -> Any:
        from tvm.ir.utils import derived_object
        from tvm.s_tir import meta_schedule as ms

        run = self

        @derived_object
        class Listener(ms.measure_callback.PyMeasureCallback):  # type: ignore[misc]
            """Keeps trials in memory, saves the time spent, shows progress."""

            def apply(
                self, task_scheduler: Any, task_id: int, measure_candidates: Any, builder_results: Any, results: Any
            ) -> None:
                """Called after every batch."""
                task = run.tasks[task_id]
                configs = [read_config(c.sch, task.template.choices) for c in measure_candidates]
                run.trials.add(task, [Trial(c, _time(r)) for c, r in zip(configs, results, strict=True)])
                run.save_time()
                run._show(task)
                run.control.show()

        return Listener()

    def _show(self, task: Task) -> None:
        done, best = len(self.trials.of(task)), self.trials.best(task, 1)
        total = self._sizes[task.template.key]
        stage = f"tune {task.label}"
        self.progress(stage, min(done, total), total)
        default = self.trials.default(task)
        if best and default is not None:
            show_detail(self.progress, stage, f"{default.seconds * 1e3:.3f} -> {best[0].seconds * 1e3:.3f} ms")

    def save_time(self) -> None:
        """Time spent counts when this run is taken up again."""
        self.state.set("seconds", self.key, round(self.control.seconds, 3))

    def decide(self) -> Records:
        """Finals of all tasks; each verdict is kept as soon as it is there."""
        accepted: list[Record] = []
        for index, task in enumerate(self.tasks):
            self.progress("compare with defaults", index, len(self.tasks))
            record = self._verdict(task)
            if record is not None:
                accepted.append(record)
                Records(accepted).save(self.directory / ACCEPTED)
        self.progress("compare with defaults", len(self.tasks), len(self.tasks))
        Records(accepted).save(self.directory / ACCEPTED)
        return Records(accepted)

    def _verdict(self, task: Task) -> Record | None:
        """The verdict of an earlier run counts as long as no trial was added."""
        key, count = _digest(self.device, task.template.key), len(self.trials.of(task))
        known = self.state.get("verdicts", key)
        if known is None or known["trials"] != count:
            verdict = finals(task, self.trials.best(task, FINALISTS + 1), self.measurer)
            record = record_of(task, self.device, verdict, self.measurer.machine)
            self.state.set("verdicts", key, {"trials": count, "record": None if record is None else _json(record)})
            return record
        return None if known["record"] is None else Record.from_json(known["record"])


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:32]


def _json(record: Record) -> dict[str, Any]:
    return {**asdict(record), "workload": json.loads(canonical(record.workload))}


def _target() -> Any:
    """The placeholder's target; what is tuned for is an attribute of the placeholder."""
    import tvm

    return tvm.target.Target({"kind": "llvm", "num-cores": 1})


def _time(result: Any) -> float:
    return statistics.median(float(v) for v in result.run_secs) if result.run_secs else math.inf


def _run(runner: Any, candidates: Sequence[Any], built: Sequence[Any]) -> list[float]:
    """Seconds of what was built; infinite where that or running failed."""
    from tvm.s_tir import meta_schedule as ms

    sound = [i for i, result in enumerate(built) if result.artifact_path is not None]
    inputs = [ms.runner.RunnerInput(built[i].artifact_path, "llvm", candidates[i].args_info) for i in sound]
    seconds = [math.inf] * len(candidates)
    for index, future in zip(sound, runner.run(inputs) if inputs else [], strict=True):
        seconds[index] = _time(future.result())
    return seconds
