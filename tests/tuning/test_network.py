"""Tuning in a build: records change speed and never results, are reported, and stay only where the network gains."""

from __future__ import annotations

import importlib.util
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import lpsn_tvm
from lpsn_tvm.budget import Budget
from lpsn_tvm.cli import app
from lpsn_tvm.errors import LpsnError, TuningError
from lpsn_tvm.records import Record, Records
from lpsn_tvm.schedules.template import Config, canonical
from lpsn_tvm.targets import get_backend
from lpsn_tvm.targets.choices import Choice, Choices
from lpsn_tvm.tuning import cost_model, network
from lpsn_tvm.tuning.measure import measurer_for
from lpsn_tvm.tuning.tasks import Task, has_choice
from lpsn_tvm.tuning.trials import Trials
from lpsn_tvm.tuning.tuner import TuningInterrupted, tune_tasks
from tests.support.synthetic_tuning import SyntheticMeasurer

MODEL = Path(__file__).resolve().parents[2] / "tutorials" / "models" / "espcn_x2.onnx"
DATA = np.random.default_rng(0).random((8, 1, 16, 16), dtype=np.float32)
OPTIONS: dict[str, Any] = {
    "calibration": DATA, "sparsity": None, "measure": False, "num_threads": 1,
    "input_shapes": {"input": (1, 1, 16, 16)},
}  # fmt: skip
LAYERS = 4


@pytest.fixture(scope="module")
def choices() -> Sequence[Choice]:
    """What lowering the network decides, where there is something to decide."""
    seen = Choices()
    backend = replace(get_backend("llvm"), maker=lambda b, mod, parts, progress: _lowered(b, mod, seen))
    with pytest.raises(_Lowered):
        lpsn_tvm.build(MODEL, target=backend, **OPTIONS)
    return seen


class _Lowered(Exception):
    pass


def _lowered(backend: Any, mod: Any, seen: Choices) -> None:
    replace(backend, on_choice=seen).lower(mod)
    raise _Lowered


@pytest.fixture(scope="module")
def built() -> Any:
    return lpsn_tvm.build(MODEL, **OPTIONS)


def other_config(choice: Choice) -> Config:
    return next(c for c in choice.template.configs() if canonical(c) != canonical(choice.template.default))


def records_for(choices: Sequence[Choice], device: str | None = None) -> Records:
    return Records(
        Record(device or c.device, c.template.name, c.template.workload, other_config(c), 1e-3, 2e-3) for c in choices
    )


def test_layers_of_the_network_have_choices(choices: Sequence[Choice], built: Any) -> None:
    assert Counter(choice.template.name for choice in choices) == {"conv2d_int8": LAYERS}
    assert {choice.device for choice in choices} == {get_backend("llvm").device}
    assert all(choice.record is None and choice.note == "" for choice in choices)
    assert built.report.tuning == {
        "devices": [choices[0].device], "digest": "", "choices": LAYERS, "layers": {}, "notes": [],
    }  # fmt: skip
    assert built.records is None


def test_records_are_used_and_change_no_result(choices: Sequence[Choice], built: Any, tmp_path: Path) -> None:
    records = records_for(choices)
    path = records.save(tmp_path / "records.json")
    tuned = lpsn_tvm.build(MODEL, records=path, **OPTIONS)
    np.testing.assert_array_equal(tuned(DATA), built(DATA))
    assert tuned.library != built.library
    tuning = tuned.report.tuning
    assert tuning["digest"] == records.digest and tuning["notes"] == []
    assert {node: layer["config"] for node, layer in tuning["layers"].items()} == {
        choice.node: dict(other_config(choice)) for choice in choices
    }
    assert f"Tuned: {LAYERS} of {LAYERS} kernels with a choice, records {records.digest[:12]}" in str(tuned.report)
    tuned.save(tmp_path / "net.lpsn")
    assert lpsn_tvm.load(tmp_path / "net.lpsn").report.tuning == tuning


def test_records_of_another_device_are_not_used(choices: Sequence[Choice], built: Any) -> None:
    records = records_for(choices, "llvm i386")
    other = lpsn_tvm.build(MODEL, records=records, **OPTIONS)
    assert other.library == built.library and other.report.tuning["layers"] == {}


def test_a_record_that_does_not_fit_is_noted(choices: Sequence[Choice], built: Any) -> None:
    records = Records(replace(record, config={**record.config, "rows": 99}) for record in records_for(choices))
    module = lpsn_tvm.build(MODEL, records=records, **OPTIONS)
    assert module.library == built.library
    assert len(module.report.tuning["notes"]) == len({canonical(r.config) for r in records})
    assert "Note: a record of conv2d_int8 is ignored: this release does not offer" in str(module.report)


def hashed(size: int, config: Config) -> float:
    return 1e-3 * (1 + zlib.crc32(canonical(config).encode()) % 100 / 100)


@pytest.fixture
def synthetic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SyntheticMeasurer]:
    measurer = SyntheticMeasurer(seconds=hashed)
    monkeypatch.setattr(network, "measurer_for", lambda backend, tracker=None, threads=1: measurer)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield measurer


def test_build_tunes(synthetic: SyntheticMeasurer, built: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(network, "time_ratio", lambda *networks: 0.9)
    tuned = lpsn_tvm.build(MODEL, tune=40, **OPTIONS)
    assert len(synthetic.trials) == 40
    np.testing.assert_array_equal(tuned(DATA), built(DATA))
    # Ten trials of a layer beat its default nearly always: which order tasks take turns in is MetaSchedule's.
    assert LAYERS // 2 <= len(tuned.records) == len(tuned.report.tuning["layers"]) <= LAYERS
    assert any("the network takes 0.900 of the time before" in note for note in tuned.report.notes)
    # What was found is in the cache: the same build again measures nothing.
    again = lpsn_tvm.build(MODEL, tune=40, **OPTIONS)
    assert len(synthetic.trials) == 40 and again.records == tuned.records
    assert (tmp_path / "cache" / "lpsn_tvm" / "tuning").is_dir()


def test_a_network_that_does_not_gain_stays_as_it_was(
    synthetic: SyntheticMeasurer, built: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(network, "time_ratio", lambda *networks: 1.02)
    module = lpsn_tvm.build(MODEL, tune=40, cache=str(tmp_path / "mine"), **OPTIONS)
    assert module.library == built.library and len(module.records) == 0
    assert any("the network took 1.020 times as long" in note for note in module.report.notes)
    assert (tmp_path / "mine" / "tuning").is_dir()


def test_the_network_is_timed_at_the_tracker(synthetic: SyntheticMeasurer, built: Any, tmp_path: Path) -> None:
    modules: list[Any] = []

    def time_networks(old: Any, new: Any) -> Any:
        modules.extend((old, new))
        return (2e-3, 2e-3), (1e-3, 1e-3)

    synthetic.time_networks = time_networks  # type: ignore[attr-defined]
    module = lpsn_tvm.build(MODEL, tune=12, tracker="board:9190", cache=str(tmp_path), **OPTIONS)
    old, new = modules
    assert old.library == built.library != new.library
    assert module is new and len(module.records) > 0
    note = f"tuned: {len(module.records)} kernels; the network takes 0.500 of the time before (measured)"
    assert note in module.report.notes


@pytest.mark.parametrize(
    ("times", "note"),
    [
        (((1e-3, 3e-3, 1e-3), (2e-3, 1e-3, 2e-3)), "but the network took 2.000 times as long with them: it stays"),
        (TuningError("timed out"), "but the network could not be timed with them (timed out): it stays"),
    ],
    ids=["slower", "failed"],
)
def test_what_was_not_seen_to_gain_stays_as_it_was(times: Any, note: str) -> None:
    def time_networks(*networks: Any) -> Any:
        if isinstance(times, TuningError):
            raise times
        return times

    old, new = (SimpleNamespace(report=SimpleNamespace(notes=[]), sources=None) for _ in range(2))
    assert network._faster(old, new, Records(), SimpleNamespace(time_networks=time_networks)) is old  # type: ignore
    assert note in old.report.notes[0] and new.report.notes == []


def test_nothing_faster(synthetic: SyntheticMeasurer, built: Any) -> None:
    synthetic.seconds = lambda size, config: 1e-3
    module = lpsn_tvm.build(MODEL, tune=10, cache=False, **OPTIONS)
    assert module.library == built.library and len(module.records) == 0
    assert "tuning found no kernel that is clearly faster than its default" in module.report.notes


ARGUMENTS = [str(MODEL), "--input-shape", "input=1x1x16x16", "--sparsity", "none", "--threads", "1"]


def test_command(synthetic: SyntheticMeasurer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(network, "time_ratio", lambda *networks: 0.9)
    np.save(tmp_path / "data.npy", DATA)
    arguments = [*ARGUMENTS, "--calibration", str(tmp_path / "data.npy")]
    output = tmp_path / "records.json"
    tune = ["tune", *arguments, "-o", str(output), "--tune", "40", "--directory", str(tmp_path / "trials")]
    done = CliRunner().invoke(app, [*tune, "--json"])
    assert done.exit_code == 0, done.output
    count = len(Records.load(output))
    assert LAYERS // 2 <= len(json.loads(done.stdout)["records"]) == count <= LAYERS
    done = CliRunner().invoke(app, tune)
    assert done.exit_code == 0 and "Kernels that beat their default" in done.stdout and len(synthetic.trials) == 40
    build = ["build", *arguments, "-o", str(tmp_path / "net.lpsn"), "--records", str(output), "--no-measure", "--json"]
    report = json.loads(CliRunner().invoke(app, build).stdout)["report"]
    assert len(report["tuning"]["layers"]) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tune", "soon"], "--tune: must be a number of trials"),
        (["--key", "gpu"], "--key: names machines of a tracker"),
        (["--records", "absent.json"], "absent.json: cannot be read"),
        (["--target", "vta"], "kernels of vta are not tuned"),
        (["--target", "cuda -arch=sm_80,sm_90"], "tuning is for one architecture"),
    ],
)
def test_command_refuses_early(options: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["tune", str(MODEL), "-o", str(tmp_path / "x.json"), *options])
    assert done.exit_code == 2 and message in done.output, done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tune", "soon"], "tune: must be a number of trials"),
        (["--tune", "10", "--key", "gpu"], "--key: names machines of a tracker"),
        (["--tracker", "127.0.0.1:9190"], "--tracker: is where --tune measures; give --tune"),
        (["--tune", "10", "--tracker", "nonsense"], "expected HOST:PORT, got 'nonsense'"),
    ],
)
def test_build_refuses_early(options: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["build", str(MODEL), "-o", str(tmp_path / "net.lpsn"), *options])
    assert done.exit_code == 2 and message in done.output, done.output


@pytest.mark.parametrize("command", ["build", "tune"])
def test_both_commands_measure_at_a_tracker(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Reached(LpsnError):
        pass

    def build(model: Path, **options: Any) -> None:
        raise Reached(options["tracker"])

    monkeypatch.setattr(lpsn_tvm, "build", build)
    common = [command, str(MODEL), "-o", str(tmp_path / "out"), "--tune", "10", "--tracker", "127.0.0.1:9190"]
    assert "Reached: 127.0.0.1:9190\n" in CliRunner().invoke(app, common).output
    assert "Reached: 127.0.0.1:9190/board\n" in CliRunner().invoke(app, [*common, "--key", "board"]).output
    text = " ".join(CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300"}).output.split())
    assert "HOST:PORT of a tracker: measure on its machines." in text and "Which of the tracker's machines." in text


def test_command_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise TuningInterrupted("12 trials are kept in there")

    monkeypatch.setattr(lpsn_tvm, "build", interrupted)
    done = CliRunner().invoke(app, ["tune", str(MODEL), "-o", str(tmp_path / "x.json")])
    assert done.exit_code == 130 and "interrupted; 12 trials are kept in there" in done.output


def test_a_gpu_that_is_not_there_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import lpsn_tvm.frontend

    monkeypatch.setattr(lpsn_tvm.frontend, "load_model", lambda *args, **kwargs: pytest.fail("work was done"))
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU")
    with pytest.raises(TuningError, match="cuda: there is nothing to measure on"):
        lpsn_tvm.build(MODEL, target="cuda -arch=sm_90", tune=10, **OPTIONS)


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        cost_model.importlib.util, "find_spec", lambda name: None if name == "xgboost" else original(name)
    )
    with pytest.raises(TuningError, match=r'tune: needs xgboost: python -m pip install "lpsn-tvm\[tune\]"'):
        lpsn_tvm.build(MODEL, tune=10, **OPTIONS)


@pytest.mark.slow
def test_real_kernels_in_worker_processes(choices: Sequence[Choice], tmp_path: Path) -> None:
    """Two layers, real compilers and clocks: nothing is asked of the times but that they are some."""
    tasks = [Task(choice.template, (choice.node,)) for choice in choices if has_choice(choice.template)][:2]
    device = choices[0].device
    measurer = measurer_for(get_backend("llvm"))
    try:
        records = tune_tasks(tasks, device, Budget(trials=24), tmp_path, measurer)
        trials = Trials(tmp_path, device, tasks)
        machine = measurer.machine
    finally:
        measurer.close()
    assert trials.count == 24
    for task in tasks:
        assert all(1e-7 < trial.seconds < 1 for trial in trials.of(task))
        assert trials.default(task) is not None
    for record in records:
        assert record.seconds <= 0.97 * record.default_seconds and record.machine == machine
