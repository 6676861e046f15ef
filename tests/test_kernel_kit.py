"""The kit of kernels for GPU machines without a GPU: what is in it, how it is run, and how faults are told."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import cuda_kernels, kernel_cases, kernel_kit, kernel_report
from benchmarks.cuda_kernels import Verdict, compare, run_family
from benchmarks.kernel_cases import RESULT, Operator, conv
from lpsn_tvm.schedules.cuda.geometry import Tile
from lpsn_tvm.targets.cuda_rules import RULES

STAND_IN = [sys.executable, str(Path(__file__).parent / "support" / "stand_in_worker.py")]
OPERATORS = (
    conv(32, 6, 32, tile=Tile(32, 32, 2, 1, splits=2)),
    conv(64, 5, 40, residual=True, bits=4),
    Operator("lpsn.global_avg_pool2d", ((1, 40, 5, 5),), {"in_zero_point": 5, "multiplier": 0.03, **RESULT}),
    Operator("lpsn.float_softmax", ((2, 50),), {"axis": 1}, "float32", is_plain=True),
    Operator("relayout", ((1, 5, 4, 4),)),
)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit")
    for operator in OPERATORS:
        kernel_cases.write_real(folder, operator, "sm_90")
    (folder / "kit.json").write_text(json.dumps({"archs": ["sm_90"], "refused": {}}))
    return folder


def test_every_operator_has_a_case_of_real_size() -> None:
    found = kernel_cases.operators()
    assert {operator.op for operator in found} - {"relayout"} == set(RULES)


def test_special_ways_have_cases_of_real_size() -> None:
    """Decided by geometry alone: no kernel is generated."""
    families, grids, shared = set(), [], []
    for operator in kernel_cases.layers():
        if operator.op != "lpsn.conv2d" or operator.dtype == "float32":
            continue
        weight = {key: np.zeros_like(value) for key, value in operator.constants(np.random.default_rng(0)).items()}
        weight["weight"].flat[0] = (1 << operator.bits - 1) - 1
        kernel = operator.kernel(weight, operator.isa or "sm_90")
        families |= {f"{kernel.key[0]} {word}" for word in kernel_kit.family_of(kernel).split()}
        geometry: Any = next((part for part in kernel.key if hasattr(part, "tile")), None)
        if hasattr(geometry, "row_tiles"):
            tile = geometry.tile
            grids.append(geometry.row_tiles * geometry.column_tiles)
            shared.append((tile.rows + tile.columns) * 32 * tile.ksteps * tile.stages)
    ways = {"split", "slices", "dp4a", "w4", "s4", "narrow"}
    assert {f"conv2d_mma {way}" for way in ways} | {"depthwise depthwise"} <= families
    assert max(grids) > 65535 and max(shared) > 48 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_cases_of_real_size_can_be_made_and_would_show_errors(arch: str, tmp_path: Path) -> None:
    ways = set()
    for operator in kernel_cases.operators():
        if max(np.prod(shape) for shape in operator.shapes) > 1 << 22:
            continue
        case, _, expected = kernel_kit.read_case(kernel_cases.write_real(tmp_path, operator, arch))
        ways.add(case.family)
        assert (expected == expected.flat[0]).mean() < 0.5, case.name
    assert any(" s4" in way for way in ways)


def test_a_kit_runs_on_the_stand_in(kit: Path) -> None:
    names = [path.name for path in kernel_kit.paths(kit)]
    verdicts = list(run_family([*STAND_IN, str(kit)], names))
    assert {verdict.case for verdict in verdicts} == set(names)
    kinds = [verdict.kind for verdict in verdicts]
    assert kinds.count("exact") >= len(names) - 1 and set(kinds) <= {"exact", "close"}, verdicts


def options(kit: Path, **changed: Any) -> Any:
    parsed = {"kit": kit, "device": 0, "limit": 60.0, "families": ["*"], "sanitize": 0, "out": None}
    return type("Options", (), parsed | changed)


def test_a_wrong_output_is_told(
    kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    path = kernel_kit.by_family(kernel_kit.paths(kit))["conv2d_mma slices w4"][0]
    case, buffers, expected = kernel_kit.read_case(path)
    wrong = expected.copy()
    wrong[0, 33, 2, 3] ^= 1
    inputs = {name: array for name, array in buffers.items() if name not in (case.out_name, *case.workspaces)}
    source = kernel_kit.read_source(kit, case.source)
    for planted in (wrong, expected):
        kernel_kit.write_case(
            tmp_path, dataclasses.replace(case, origin=f"planted {planted is wrong}"), source, inputs, planted
        )
    (tmp_path / "kit.json").write_text(json.dumps({"archs": ["sm_90"]}))
    monkeypatch.setattr(cuda_kernels, "this_gpu", lambda index: ("Test GPU", 90, 1 << 17))
    monkeypatch.setattr(cuda_kernels, "worker_command", lambda *_: [*STAND_IN, str(tmp_path)])
    assert cuda_kernels.run(options(tmp_path, out=tmp_path / "out.json")) == 1
    told = capsys.readouterr().out
    assert "1 wrong, 1 exact" in told and "planted True" in told
    assert "1 of 1000 values differ" in told and f"first at (0, 33, 2, 3): {expected[0, 33, 2, 3]} instead of" in told
    assert "channels 33 of 40" in told and "lanes 1" in told
    assert len(json.loads((tmp_path / "out.json").read_text())["conv2d_mma slices w4"]["cases"]) == 1


def test_a_kit_for_another_gpu_says_so(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "this_gpu", lambda index: ("Old GPU", 75, 1 << 16))
    with pytest.raises(SystemExit, match="Old GPU is sm_75; the kit is for sm_90"):
        cuda_kernels.run(options(kit))


WORKER = """
import json, os, sys, time
for name in json.load(open(sys.argv[1])):
    print(json.dumps({"start": name}), flush=True)
    if name == "crash":
        os._exit(3)
    if name == "fault":
        print(json.dumps({"case": name, "kind": "died", "details": "error 700"}), flush=True)
        os._exit(1)
    print("noise", flush=True)
    print(json.dumps({"case": name, "kind": "exact", "details": ""}), flush=True)
"""


def test_the_rest_of_a_family_goes_on_after_a_crash() -> None:
    names = ["a", "crash", "b", "fault", "c"]
    verdicts = list(run_family([sys.executable, "-c", WORKER], names))
    assert {v.case: v.kind for v in verdicts} == dict(
        zip(names, ["exact", "died", "exact", "died", "exact"], strict=True)
    )
    assert "ended with status 3" in verdicts[1].details


def test_a_worker_that_cannot_begin_ends_the_run() -> None:
    with pytest.raises(SystemExit, match="no GPU here"):
        list(run_family([sys.executable, "-c", "raise SystemExit('no GPU here')"], ["a"]))


HANGING = """
import sys, time
sys.path[:0] = {root!r}, {root!r} + "/tests/support"
from benchmarks import cuda_kernels
class Device:
    def __init__(self, *arguments, **options): pass
cuda_kernels.KernelDevice = Device
cuda_kernels.run_case = lambda *arguments: time.sleep(60)
cuda_kernels.work(None.__class__ and __import__("pathlib").Path("."), ["slow"], "sm_90", 0, 1.0, has_guards=True)
"""


def test_a_case_that_does_not_end_is_ended() -> None:
    root = str(Path(__file__).resolve().parents[1])
    (verdict,) = run_family([sys.executable, "-c", HANGING.format(root=root)], ["slow"])
    assert verdict.kind == "died" and verdict.details.startswith("took too long")


def test_comparison() -> None:
    want = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert compare(want, want) == ("exact", "")
    assert compare(want * np.float32(1.00001), want)[0] == "close"
    assert compare(want + 1, want)[0] == "wrong"
    none = np.where(want == 2, np.nan, want).astype(np.float32)
    assert compare(none, none)[0] == "exact" and compare(none, want)[0] == "wrong"
    assert compare(want.astype(np.int8) + 1, want.astype(np.int8))[0] == "wrong"


def test_patterns_of_errors() -> None:
    wrong = np.zeros((2, 64, 8, 8), bool)
    wrong[:, 8:16, :4] = wrong[:, 40:48, :4] = True
    told = kernel_report.pattern(wrong)
    assert told == "wrong are all samples, channels 8-15, 40-47 of 64, rows 0-3 of 8, all columns, lanes 8-15"


MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 16 bytes
=========     at kernel_kernel+0x1a30
=========     by thread (33,0,0) in block (2,0,0)
=========     Address 0x7f2 is out of bounds
========= ERROR SUMMARY: 1 error
"""


def test_findings_of_the_sanitizer(tmp_path: Path) -> None:
    log = tmp_path / "log.17"
    assert "left no log" in kernel_report.sanitizer_errors(tmp_path)[0]
    log.write_text("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n")
    assert kernel_report.sanitizer_errors(tmp_path) == []
    log.write_text(MEMCHECK)
    (tmp_path / "log.18").write_text("========= ERROR SUMMARY: 0 errors\n")
    (found,) = kernel_report.sanitizer_errors(tmp_path)
    assert "Invalid __global__ write" in found and "thread (33,0,0)" in found
    summary = "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)"
    log.write_text(summary + "\n")
    assert kernel_report.sanitizer_errors(tmp_path) == [summary]


SANITIZER = f"""#!{sys.executable}
import os, sys
assert sys.argv[1:3] == ["--tool", "memcheck"] and "--separate" in sys.argv
log = sys.argv[sys.argv.index("--log-file") + 1].replace("%p", str(os.getpid()))
open(log, "w").write("========= Invalid __shared__ read of size 4 bytes\\n")
os.execv(sys.executable, [sys.executable, {STAND_IN[1]!r}, sys.argv[sys.argv.index("--kit") + 1], sys.argv[-1]])
"""


def test_sanitizing(kit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(cuda_kernels, "this_gpu", lambda index: ("Test GPU", 90, 1 << 17))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit, match="needs compute-sanitizer"):
        cuda_kernels.run(options(kit, sanitize=1))
    script = tmp_path / "compute-sanitizer"
    script.write_text(SANITIZER)
    script.chmod(0o755)
    monkeypatch.undo()
    monkeypatch.setattr(cuda_kernels, "this_gpu", lambda index: ("Test GPU", 90, 1 << 17))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert cuda_kernels.run(options(kit, sanitize=1, families=["relayout"])) == 1
    told = capsys.readouterr().out
    assert "1 cases: 1 exact" in told and "MEMCHECK relayout" in told and "Invalid __shared__ read" in told


def test_a_kit_takes_cases_from_many_tests(tmp_path: Path) -> None:
    case = kernel_kit.read_description(kernel_cases.write_real(tmp_path / "one", OPERATORS[-1], "sm_90"))
    buffers, expected = {"x": np.zeros(1, np.uint8)}, np.zeros(case.out.shape, np.uint8)
    origins = ["test_a[1]", "test_a[2]", "test_a[3]", "test_b", f"{kernel_kit.REAL} x"]
    for origin in origins:
        kernel_kit.write_case(tmp_path, dataclasses.replace(case, origin=origin), "", buffers, expected)
    taken = [kernel_kit.read_description(path).origin for path in kernel_kit.selected(kernel_kit.paths(tmp_path), 2)]
    assert len(taken) == 3 and {"test_b", f"{kernel_kit.REAL} x"} < set(taken)


def test_verdicts_are_lines_of_json() -> None:
    verdict = Verdict("a.npz", "wrong", 'said "so"')
    assert Verdict(**json.loads(json.dumps(verdict.__dict__))) == verdict
