"""The tuner on kernels whose times are a formula: what it finds, what it may spend, and what survives a kill."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lpsn_tvm.budget import Budget
from lpsn_tvm.errors import TuningError
from lpsn_tvm.progress import silent
from lpsn_tvm.records import Record, Records
from lpsn_tvm.schedules.template import canonical
from lpsn_tvm.tuning import control
from lpsn_tvm.tuning.control import Control
from lpsn_tvm.tuning.search import BATCH
from lpsn_tvm.tuning.trials import RECORDS, WORKLOADS, Trials, cut_torn_lines
from lpsn_tvm.tuning.tuner import ACCEPTED, TuningInterrupted, tune_tasks
from tests.support.synthetic_tuning import BEST, DEVICE, SyntheticMeasurer, seconds_of, task, template


def configs_of(records):
    return {int(record.workload["size"]): dict(record.config) for record in records}


def run(tasks, trials, directory, measurer=None, device=DEVICE, **options):
    measurer = measurer or SyntheticMeasurer()
    return tune_tasks(tasks, device, Budget(trials=trials), directory, measurer, **options), measurer


def test_the_optimum_is_found_with_a_fraction_of_the_space(tmp_path):
    space = sum(1 for _ in template().configs())
    records, measurer = run([task(1, uses=2), task(3)], 100, tmp_path)
    assert len(measurer.trials) == 100 < space
    assert configs_of(records) == {1: BEST[1], 3: BEST[3]}
    for record in records:
        assert record.device == DEVICE and record.machine == "formula" and record.date
        assert record.seconds == pytest.approx(seconds_of(int(record.workload["size"]), record.config))
        assert record.default_seconds == pytest.approx(seconds_of(int(record.workload["size"]), template().default))
    assert Records.load(tmp_path / ACCEPTED) == records


def test_the_same_seed_measures_the_same_whatever_was_drawn_before(tmp_path):
    def trials(name, seed):
        return run([task(1), task(3)], 40, tmp_path / name, seed=seed)[1].trials

    first = trials("first", 5)
    np.random.seed(1)
    assert trials("second", 5) == first != trials("third", 6)
    assert np.random.random() == np.random.RandomState(1).random()


def test_nothing_is_measured_twice_and_the_default_always(tmp_path):
    _, measurer = run([task(1)], 60, tmp_path)
    seen = [canonical(config) for _, config in measurer.trials]
    assert len(set(seen)) == len(seen) == 60
    assert measurer.trials[0][1] == template().default
    assert all(template().is_valid(config) for _, config in measurer.trials)
    # Finals: the default first, and the best few.
    assert measurer.comparisons[0][0] == template().default and len(measurer.comparisons[0]) == 5


def test_a_small_space_is_tried_whole_and_no_more(tmp_path):
    small = task(1)
    small = replace(small, template=replace(small.template, validator=lambda c: c["rows"] == 1 and c["order"] in "ae"))
    whole = list(small.template.configs())
    assert len(whole) == 28
    records, measurer = run([small], 1000, tmp_path)
    assert sorted(canonical(c) for _, c in measurer.trials) == sorted(canonical(c) for c in whole)
    assert configs_of(records) == {1: {"rows": 1, "columns": 3, "order": "e"}}


def test_more_trials_go_where_more_time_is_spent(tmp_path):
    _, measurer = run([task(1), task(9, uses=4)], 60, tmp_path)
    counts = {size: sum(s == size for s, _ in measurer.trials) for size in (1, 9)}
    assert counts[9] > 2 * counts[1] > 0


def test_where_the_default_is_best_it_stays(tmp_path):
    records, measurer = run([task(2, default=BEST[2])], 60, tmp_path)
    assert len(records) == 0 and len(measurer.trials) == 60
    assert len(Records.load(tmp_path / ACCEPTED)) == 0


def test_a_gain_below_the_margin_is_not_accepted(tmp_path):
    def flat(size, config):
        return 1e-3 * (1 if config == template().default else 0.98)

    assert len(run([task(1)], 30, tmp_path / "a", SyntheticMeasurer(seconds=flat))[0]) == 0

    def faster(size, config):
        return 1e-3 * (1 if config == template().default else 0.96)

    assert len(run([task(1)], 30, tmp_path / "b", SyntheticMeasurer(seconds=faster))[0]) == 1


def test_what_computes_something_else_is_never_accepted(tmp_path):
    measurer = SyntheticMeasurer(is_wrong=lambda config: config["order"] == "e")
    with pytest.warns(UserWarning, match="synthetic computes something else than its default"):
        records, _ = run([task(1)], 60, tmp_path, measurer)
    assert all(config["order"] != "e" for config in configs_of(records).values())


def test_failing_configurations_are_trials_like_others(tmp_path):
    def seconds(size, config):
        return math.inf if config["order"] in "bdf" else seconds_of(size, config)

    records, measurer = run([task(1)], 80, tmp_path, SyntheticMeasurer(seconds=seconds))
    assert len(measurer.trials) == 80
    assert configs_of(records) == {1: BEST[1]}
    assert run([task(1)], 80, tmp_path)[1].trials == []


def test_where_everything_fails_nothing_is_recorded(tmp_path):
    records, measurer = run([task(1)], 20, tmp_path, SyntheticMeasurer(seconds=lambda size, config: math.inf))
    assert len(records) == 0 and len(measurer.trials) == 20


def test_finished_trials_count_when_a_run_goes_on(tmp_path):
    _, first = run([task(1), task(2)], 30, tmp_path)
    records, second = run([task(1), task(2)], 60, tmp_path)
    assert len(first.trials) == 30 and len(second.trials) == 30
    both = [(size, canonical(config)) for size, config in first.trials + second.trials]
    assert len(set(both)) == len(both)
    assert set(configs_of(records)) == {1, 2}
    again, third = run([task(1), task(2)], 60, tmp_path)
    assert third.trials == third.comparisons == []
    assert again == records


def test_devices_share_a_directory_and_nothing_else(tmp_path):
    run([task(1)], 24, tmp_path)
    records, measurer = run([task(1)], 24, tmp_path, device="another")
    assert len(measurer.trials) == 24
    assert {record.device for record in records} == {"another"}


def test_known_records_are_tried_first(tmp_path):
    known = Records([Record(DEVICE, "synthetic", {"size": 1}, BEST[1], 1e-3, 2e-3)])
    records, measurer = run([task(1)], 2, tmp_path, known=known)
    assert [config for _, config in measurer.trials] == [template().default, BEST[1]]
    assert configs_of(records) == {1: BEST[1]}


def test_a_time_budget_ends_the_search(tmp_path, monkeypatch):
    """A clock that only trials advance: a tenth of a second each."""
    clock = [0.0]
    monkeypatch.setattr(control, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def on_trial(config):
        clock[0] += 0.1

    measurer = SyntheticMeasurer(on_trial=on_trial)
    tune_tasks([task(1), task(2)], DEVICE, Budget(seconds=7.5), tmp_path, measurer)
    # Four fifths of it for the search; batches that have begun are finished.
    assert 60 <= len(measurer.trials) < 60 + 3 * BATCH
    again = SyntheticMeasurer(on_trial=on_trial)
    tune_tasks([task(1), task(2)], DEVICE, Budget(seconds=7.5), tmp_path, again)
    assert again.trials == []
    more = SyntheticMeasurer(on_trial=on_trial)
    tune_tasks([task(1), task(2)], DEVICE, Budget(seconds=12.5), tmp_path, more)
    assert 100 <= len(measurer.trials) + len(more.trials) < 100 + 3 * BATCH


def test_templates_with_different_features_share_a_model(tmp_path):
    other = task(5)
    other = replace(other, template=replace(other.template, name="other", featurizer=lambda c: (float(c["rows"]),)))
    records, _ = run([task(1), other], 40, tmp_path)
    assert {record.template for record in records} == {"synthetic", "other"}


def test_no_tasks_no_work(tmp_path):
    assert len(run([], 10, tmp_path / "never")[0]) == 0
    assert not (tmp_path / "never").exists()


def test_progress_names_layers_and_counts_trials(tmp_path):
    calls, details = [], []

    def progress(stage, done, total):
        calls.append((stage, done, total))

    progress.detail = lambda stage, text: details.append((stage, text))
    run([task(1, uses=3)], 24, tmp_path, progress=progress)
    assert calls[-1] == ("compare with defaults", 1, 1)
    assert [done for stage, done, total in calls if stage == "tune"][-1] == 24
    layer = [done for stage, done, _ in calls if stage == "tune layer1.0 (x3)"]
    assert layer == sorted(layer) and layer[-1] == 24
    assert details[-1][1].startswith("3.400 -> ")


PROGRAM = """
import os, signal, sys
from lpsn_tvm.compat import import_tvm
import_tvm()  # without torch
from pathlib import Path
from types import SimpleNamespace
from lpsn_tvm.budget import Budget
from lpsn_tvm.errors import TuningError
from lpsn_tvm.progress import silent
from lpsn_tvm.tuning import control
from lpsn_tvm.tuning.control import Control
from lpsn_tvm.tuning.search import BATCH
from lpsn_tvm.tuning.tuner import tune_tasks
from tests.support.synthetic_tuning import DEVICE, SyntheticMeasurer, task
count = 0
def on_trial(config):
    global count
    count += 1
    if count == 45:
        os.kill(os.getpid(), signal.SIGKILL)
measurer = SyntheticMeasurer(on_trial=on_trial)
tune_tasks([task(1), task(2)], DEVICE, Budget(trials=100), Path(sys.argv[1]), measurer)
"""


def test_a_killed_run_goes_on(tmp_path):
    killed = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], timeout=200, check=False, cwd=Path(__file__).parents[2]
    )
    assert killed.returncode == -signal.SIGKILL
    # And as if it had been killed while it wrote.
    records = tmp_path / RECORDS
    records.write_bytes(records.read_bytes() + b'[0,[[["GetSB')
    done = len(records.read_text().splitlines()) - 1
    assert done >= 34
    found, measurer = run([task(1), task(2)], 100, tmp_path)
    assert len(measurer.trials) == 100 - done
    assert configs_of(found) == {1: BEST[1], 2: BEST[2]}


def test_ctrl_c_ends_after_the_batch_and_says_how_to_go_on(tmp_path):
    measurer = SyntheticMeasurer()
    measurer.on_trial = lambda config: os.kill(os.getpid(), signal.SIGINT) if len(measurer.trials) == 44 else None
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TuningInterrupted, match=f"trials are kept in {tmp_path}; the same command"):
        run([task(1), task(2)], 100, tmp_path, measurer)
    assert signal.getsignal(signal.SIGINT) is before
    assert measurer.comparisons == []
    kept = len(measurer.trials)
    assert 45 <= kept < 56 and kept == len((tmp_path / RECORDS).read_text().splitlines())
    assert len(run([task(1), task(2)], 100, tmp_path)[1].trials) == 100 - kept


def test_ctrl_c_in_the_finals_keeps_finished_verdicts(tmp_path):
    class Interrupted(SyntheticMeasurer):
        def compare(self, *args):
            if len(self.comparisons) == 1:
                raise KeyboardInterrupt
            return super().compare(*args)

    with pytest.raises(TuningInterrupted, match="the same command"):
        run([task(1), task(2)], 40, tmp_path, Interrupted())
    assert len(Records.load(tmp_path / ACCEPTED)) == 1
    records, measurer = run([task(1), task(2)], 40, tmp_path)
    assert len(records) == 2 and len(measurer.comparisons) == 1 and measurer.trials == []


def test_a_second_ctrl_c_ends_at_once():
    counter = Control(Budget(trials=10), 0, 0.0, silent)
    with pytest.raises(KeyboardInterrupt), counter.interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        assert counter.is_interrupted and counter.left() == 0
        os.kill(os.getpid(), signal.SIGINT)


def test_two_runs_do_not_share_a_directory_at_once(tmp_path):
    first = Trials(tmp_path, DEVICE, [task(1)])
    with pytest.raises(TuningError, match="another run is tuning in this directory"):
        run([task(1)], 8, tmp_path)
    first.close()
    run([task(1)], 8, tmp_path)


@pytest.mark.parametrize("damage", [b"", b"\n", b"[0", b"[0,[[[]]]]\x00", b"[99,[]]\n", b"null\n", b"\xff\xfe\n"])
def test_torn_files_are_cut(tmp_path, damage):
    run([task(1)], 16, tmp_path)
    path = tmp_path / RECORDS
    sound = path.read_bytes()
    path.write_bytes(sound + damage)
    cut_torn_lines(tmp_path)
    assert path.read_bytes() == sound


def test_records_of_a_torn_workload_are_cut_with_it(tmp_path):
    run([task(1), task(2)], 20, tmp_path)
    path = tmp_path / WORKLOADS
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2
    path.write_bytes(lines[0] + lines[1][:100])
    cut_torn_lines(tmp_path)
    assert path.read_bytes() == lines[0]
    assert all(json.loads(line)[0] == 0 for line in (tmp_path / RECORDS).read_text().splitlines())
    assert len(run([task(1), task(2)], 20, tmp_path)[0]) == 2
