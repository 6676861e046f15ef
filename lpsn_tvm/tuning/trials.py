"""The trials of a directory: MetaSchedule's `JSONDatabase`, made readable again after a kill, and what is in it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lpsn_tvm.container import write_atomically
from lpsn_tvm.errors import TuningError
from lpsn_tvm.schedules.template import Template, Value, canonical
from lpsn_tvm.tuning.space import annotate, placeholder
from lpsn_tvm.tuning.tasks import Task

WORKLOADS, RECORDS, STATE, LOCK = "database_workload.json", "database_tuning_record.json", "state.json", "lock"
FAILED_SECONDS = 1e9
"""MetaSchedule writes down a failed trial with a time of 1e10 seconds."""


@dataclass(frozen=True)
class Trial:
    """A configuration that was measured; infinite seconds where it could not be built or run."""

    config: Mapping[str, Value]
    seconds: float


class Trials:
    """All trials of one device in one directory.

    Parameters
    ----------
    directory : Path
        Is made where it is missing.
    device : str
        Only trials of this device are read and written.
    tasks : sequence of Task
        Only their trials are.

    Raises
    ------
    TuningError
        The directory cannot be written, or another run is at work in it.
    """

    def __init__(self, directory: Path, device: str, tasks: Iterable[Task]) -> None:
        from tvm.s_tir import meta_schedule as ms

        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(directory)
            cut_torn_lines(directory)
            (directory / WORKLOADS).touch()
        except OSError as error:
            raise TuningError(f"cannot be used: {error.strerror or error}", where=str(directory)) from error
        self.database = ms.database.JSONDatabase(work_dir=str(directory))
        self.modules = {task.template.key: placeholder(task.template, device) for task in tasks}
        self._templates = {task.template.key: task.template for task in tasks}
        self._found: dict[str, list[Trial]] = {key: [] for key in self.modules}
        self._read()

    def close(self) -> None:
        """Let other runs into the directory (as the end of the process does, too)."""
        self._lock.close()

    def _read(self) -> None:
        keys = {_identity(mod): key for key, mod in self.modules.items()}
        for record in self.database.get_all_tuning_records():
            key = keys.get(_identity(record.workload.mod))
            if key is not None:
                config = config_of(record.trace, self._templates[key])
                self._found[key].append(Trial(config, _seconds(record.run_secs)))

    def of(self, task: Task) -> list[Trial]:
        """Trials of a task, in order of time."""
        return self._found[task.template.key]

    def add(self, task: Task, trials: Iterable[Trial]) -> None:
        """Keep in memory what MetaSchedule writes to the file by itself."""
        self._found[task.template.key].extend(trials)

    def write(self, task: Task, trial: Trial) -> None:
        """Add a trial to memory and file."""
        from tvm import s_tir
        from tvm.s_tir import meta_schedule as ms

        mod = self.modules[task.template.key]
        sch = s_tir.Schedule(mod)
        annotate(sch, task.template, trial.config)
        seconds = trial.seconds if math.isfinite(trial.seconds) else 10 * FAILED_SECONDS
        arguments = ms.arg_info.ArgInfo.from_prim_func(mod["main"])
        workload = self.database.commit_workload(mod)
        record = ms.database.TuningRecord(sch.trace, workload, [seconds], _target(), arguments)
        self.database.commit_tuning_record(record)
        self.add(task, [trial])

    @property
    def count(self) -> int:
        """Trials of all tasks."""
        return sum(len(found) for found in self._found.values())

    def best(self, task: Task, count: int) -> list[Trial]:
        """The fastest trials of a task, each configuration once; none that failed."""
        fastest: dict[str, Trial] = {}
        for trial in self.of(task):
            key = canonical(trial.config)
            if math.isfinite(trial.seconds) and (key not in fastest or trial.seconds < fastest[key].seconds):
                fastest[key] = trial
        return sorted(fastest.values(), key=lambda trial: trial.seconds)[:count]

    def default(self, task: Task) -> Trial | None:
        """The first trial of the default configuration."""
        wanted = canonical(task.template.default)
        return next((trial for trial in self.of(task) if canonical(trial.config) == wanted), None)


def _locked(directory: Path) -> IO[bytes]:
    """The directory's lock file, held until it is closed: two runs would write into each other's lines."""
    import fcntl

    file = (directory / LOCK).open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise TuningError(
            "another run is tuning in this directory; wait for it, or choose another one", where=str(directory)
        ) from error
    return file


def _identity(mod: Any) -> str:
    attrs = mod["main"].attrs
    return "\n".join(str(attrs.get(f"lpsn.{name}")) for name in ("device", "template", "workload", "choices"))


def _target() -> Any:
    import tvm

    return tvm.target.Target({"kind": "llvm", "num-cores": 1})


def _seconds(values: Any) -> float:
    seconds = statistics.median(float(value) for value in values) if values else math.inf
    return seconds if seconds < FAILED_SECONDS else math.inf


def config_of(trace: Any, template: Template) -> dict[str, Value]:
    """The configuration that a recorded trace decided on; its decisions come in the order of the knobs."""
    decided = [int(trace.decisions[inst]) for inst in trace.insts if inst.kind.name == "SampleCategorical"]
    return {knob: values[index] for (knob, values), index in zip(template.choices.items(), decided, strict=True)}


def cut_torn_lines(directory: Path) -> None:
    """Drop what a killed process left unfinished: each file keeps its longest readable beginning, and no record points
    to a workload that is not there.
    """
    workloads = _keep(directory / WORKLOADS, lambda line: isinstance(line, list) and len(line) == 2)
    _keep(directory / RECORDS, lambda line: isinstance(line, list) and len(line) == 2 and 0 <= line[0] < workloads)


def _keep(path: Path, is_sound: Any) -> int:
    """Cut a file of JSON lines before its first unsound line; how many are left."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    size = count = 0
    for line in _complete_lines(data):
        try:
            sound = bool(is_sound(json.loads(line)))
        except (ValueError, TypeError):
            sound = False
        if not sound:
            break
        size, count = size + len(line), count + 1
    if size < len(data):
        with path.open("r+b") as file:
            file.truncate(size)
    return count


def _complete_lines(data: bytes) -> Iterator[bytes]:
    return (line for line in data.splitlines(keepends=True) if line.endswith(b"\n"))


class State:
    """What a directory keeps beside its trials, as JSON: seconds spent, and verdicts on finished tasks."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / STATE
        try:
            self.content: dict[str, Any] = json.loads(self.path.read_text())
        except (OSError, ValueError):
            self.content = {}

    def get(self, section: str, key: str) -> Any:
        """A value, or None."""
        return self.content.get(section, {}).get(key)

    def set(self, section: str, key: str, value: Any) -> None:
        """Change a value and write the file, atomically."""
        self.content.setdefault(section, {})[key] = value
        write_atomically(self.path, json.dumps(self.content, indent=1).encode())
