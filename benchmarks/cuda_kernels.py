"""Every kernel by itself on an NVIDIA GPU: bit-exact or not, and where not.

    python benchmarks/cuda_kernels.py --prepare kit/ --archs sm_90     # anywhere: needs this package, its tests, nvcc
    python benchmarks/cuda_kernels.py --kit kit/                       # GPU machine: numpy and the driver are enough
    ... --families "conv2d_mma*" --sanitize                            # some of them, under compute-sanitizer

A kit holds cases of every kernel family: small ones, recorded from the tests of kernels, whose expected outputs come
from the emulation (and agree with `lpsn_tvm/quant.py`, or the test had failed), and layers of real size, whose expected
outputs come from `quant.py` itself. Workspaces and outputs start as garbage; every buffer lies between guard bytes.

Families run in processes of their own: a kernel that reads or writes where there is no memory takes the process's GPU
context with it. The case under way is named and the rest of the family goes on in a new process, as it does after a
case that takes longer than --limit seconds.

Verdicts: "exact"; "close" (floats that differ by rounding: exp and division may round otherwise on a GPU); "wrong"
(says which elements); "damaged" (bytes outside of buffers were written); "failed" (the driver's error); "died" (took
its process along, or did not end); "skipped" (needs more shared memory than this GPU has, or nvcc refused it).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
if Path(sys.path[0]).resolve() == HERE:
    # This folder may not stay: `import cuda` (NVIDIA's bindings) would find a file of it.
    sys.path[0] = str(HERE.parent)

from benchmarks import kernel_kit, kernel_report
from benchmarks.cuda_kit import read_index
from benchmarks.kernel_device import GuardError, KernelDevice, fitting_arch
from lpsn_tvm.errors import LpsnError
from lpsn_tvm.targets.cuda_driver import Driver
from lpsn_tvm.targets.cuda_errors import DriverError, is_dead

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
GOOD = ("exact", "close", "skipped")
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Verdict:
    """What became of one case."""

    case: str
    kind: str
    details: str = ""


def compare(got: Any, want: Any) -> tuple[str, str]:
    """Verdict and details; `got` and `want` in logical shape."""
    is_same = (got == want) | ((got != got) & (want != want))
    wrong = np.flatnonzero(~is_same)
    if not wrong.size:
        return "exact", ""
    first = tuple(map(int, np.unravel_index(wrong[0], want.shape)))
    last = tuple(map(int, np.unravel_index(wrong[-1], want.shape)))
    difference = np.abs(got.astype(np.float64) - want.astype(np.float64)).max()
    details = (
        f"{wrong.size} of {want.size} values differ, by {difference:.4g} at most; "
        f"first at {first}: {got[first]} instead of {want[first]}, last at {last}: {got[last]} instead of {want[last]}"
    )
    if want.dtype == np.float32 and difference <= TOLERANCE * max(1.0, float(np.abs(want).max())):
        return "close", details
    return "wrong", details + "; " + kernel_report.pattern(~is_same)


def run_case(device: KernelDevice, folder: Path, path: Path, arch: str) -> Verdict:
    """One case on the GPU; errors that end the process's context are raised."""
    case, buffers, expected = kernel_kit.read_case(path)
    binary = kernel_kit.read_binary(folder, case.source, arch)
    if binary is None:
        return Verdict(path.name, "skipped", f"no machine code for {arch}, see kit.json")
    if case.shared_bytes > device.device.shared_bytes:
        return Verdict(path.name, "skipped", f"{case.shared_bytes} bytes of shared memory")
    read_only = {name: array.copy() for name, array in buffers.items() if name not in (case.out_name, *case.workspaces)}
    try:
        device.run(binary, case.launches, buffers)
    except GuardError as error:
        return Verdict(path.name, "damaged", str(error))
    except DriverError as error:
        if is_dead(error):
            raise
        return Verdict(path.name, "failed", str(error))
    for name, array in read_only.items():
        if array.tobytes() != buffers[name].tobytes():
            return Verdict(path.name, "damaged", f"the kernel wrote to its input {name!r}")
    return Verdict(path.name, *compare(case.out.unpack(buffers[case.out_name]), expected))


def work(folder: Path, names: Sequence[str], arch: str, index: int, limit: float, *, has_guards: bool) -> None:
    """Run cases, one line of JSON on standard output before each and one after."""
    import faulthandler

    device = KernelDevice(index, has_guards=has_guards)
    for name in names:
        print(json.dumps({"start": name}), flush=True)
        # A kernel that does not end keeps the thread in the driver; this ends the process all the same.
        faulthandler.dump_traceback_later(limit, exit=True)
        try:
            verdict = run_case(device, folder, folder / "cases" / name, arch)
        except DriverError as error:
            print(json.dumps({"case": name, "kind": "died", "details": str(error)}), flush=True)
            os._exit(1)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(verdict.__dict__), flush=True)
    device.close()


def run_family(command: Sequence[str], names: Sequence[str]) -> Iterator[Verdict]:
    """Verdicts of all cases, from as many worker processes as it takes.

    Parameters
    ----------
    command : sequence of str
        Starts a worker; reads names of cases from a file, whose path is appended.
    """
    left = list(names)
    while left:
        begun, died = "", False
        with tempfile.TemporaryDirectory() as scratch:
            listed, messages = Path(scratch) / "names.json", Path(scratch) / "messages"
            listed.write_text(json.dumps(left))
            with messages.open("wb") as file:
                worker = subprocess.Popen([*command, str(listed)], stdout=subprocess.PIPE, stderr=file, text=True)
                assert worker.stdout is not None
                for line in filter(_is_record, worker.stdout):
                    record = json.loads(line)
                    if "start" in record:
                        begun = record["start"]
                        continue
                    begun, died = "", died or record["kind"] == "died"
                    left.remove(record["case"])
                    yield Verdict(**record)
                status = worker.wait()
            said = messages.read_text(errors="replace").strip()
        if begun:
            left.remove(begun)
            ended = "took too long" if "Timeout (" in said else f"its process ended with status {status}"
            yield Verdict(begun, "died", f"{ended}; {said[-300:]}")
        elif left and not died:
            # Not a case's fault: no GPU, no driver.
            raise SystemExit(f"the worker ended with status {status}: {said[-1000:]}")


def _is_record(line: str) -> bool:
    return line.startswith(('{"start"', '{"case"'))


def worker_command(options: argparse.Namespace, arch: str, logs: Path, tool: str) -> list[str]:
    """What starts a worker, under compute-sanitizer if `tool` is given."""
    command = [
        sys.executable,
        str(HERE / "cuda_kernels.py"),
        "--kit",
        str(options.kit),
        "--device",
        str(options.device),
    ]
    command += ["--worker-arch", arch, "--limit", str(options.limit * (20 if tool else 1))]
    if tool:
        sanitizer = ["compute-sanitizer", "--tool", tool, "--log-file", f"{logs}/log.%p", "--print-limit", "20"]
        command = [*sanitizer, *command, "--separate"]
    return [*command, "--worker"]


def this_gpu(index: int) -> tuple[str, int, int]:
    """Name, compute capability and shared memory of a block."""
    device = Driver.open().device(index)
    return device.name, device.number, device.shared_bytes


def run(options: argparse.Namespace) -> int:
    """Everything that is asked for; how many cases are not as they should be."""
    kit = read_index(options.kit, "archs")
    name, number, _ = this_gpu(options.device)
    arch = fitting_arch(kit["archs"], number)
    if arch is None:
        raise SystemExit(f"{name} is sm_{number}; the kit is for {', '.join(kit['archs'])}: --prepare another one")
    print(f"{name} (sm_{number}), machine code for {arch}")
    families = kernel_kit.by_family(kernel_kit.paths(options.kit))
    families = {f: p for f, p in families.items() if any(fnmatch.fnmatch(f, one) for one in options.families)}
    if not families:
        raise SystemExit("no such family in the kit; --list names them")
    if options.sanitize and shutil.which("compute-sanitizer") is None:
        raise SystemExit("--sanitize needs compute-sanitizer of the CUDA toolkit on PATH")
    return _run_families(options, families, lambda logs, tool: worker_command(options, arch, logs, tool))


def _run_families(options: argparse.Namespace, families: dict[str, list[Path]], command: Any) -> int:
    kept: dict[str, Any] = {}
    failures: list[tuple[str, Verdict]] = []
    start = time.perf_counter()
    for tool in TOOLS[: options.sanitize] if options.sanitize else ("",):
        for family, paths in families.items():
            with tempfile.TemporaryDirectory() as scratch:
                logs = Path(scratch)
                verdicts = list(run_family(command(logs, tool), [path.name for path in paths]))
                found = kernel_report.sanitizer_errors(logs) if tool else []
            counts = Counter(verdict.kind for verdict in verdicts)
            told = ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts, key=GOOD.__contains__))
            print(f"{tool:10s} {family:44s} {len(verdicts):4d} cases: {told}", flush=True)
            failures += [(family, verdict) for verdict in verdicts if verdict.kind not in GOOD]
            failures += [(family, Verdict("", tool, text)) for text in found]
            kept[f"{tool} {family}".strip()] = {"counts": counts, "sanitizer": found} | {
                "cases": {v.case: [v.kind, v.details] for v in verdicts if v.kind != "exact"}
            }
    for family, verdict in failures:
        path = options.kit / "cases" / verdict.case
        what = kernel_kit.read_description(path).name if verdict.case else family
        print(f"\n{verdict.kind.upper()} {what}\n  {verdict.details}\n  {path if verdict.case else ''}")
    print(f"\n{len(failures)} failures in {time.perf_counter() - start:.0f} s")
    if options.out:
        options.out.write_text(json.dumps(kept, indent=1) + "\n")
    return len(failures)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="make a kit: run the tests, record, compile")
    parser.add_argument("--archs", nargs="*", default=["sm_90"], help="of --prepare")
    parser.add_argument("--recorded", type=Path, metavar="DIR", help="cases that LPSN_CUDA_KIT=DIR has kept already")
    parser.add_argument("--limit-per-family", type=int, default=16, help="recorded cases of a family in a kit")
    parser.add_argument("--kit", type=Path, metavar="DIR", help="run a kit")
    parser.add_argument("--list", action="store_true", help="families of the kit")
    parser.add_argument("--families", nargs="*", default=["*"], help="patterns as of file names")
    parser.add_argument("--sanitize", nargs="?", type=int, const=2, default=0, choices=range(1, len(TOOLS) + 1),
                        help=f"under compute-sanitizer: the first N of {', '.join(TOOLS)}; 2 if not said")  # fmt: skip
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one case")
    parser.add_argument("--out", type=Path, help="keep verdicts in this JSON file")
    for hidden in ("--worker", "--worker-arch"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--separate", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        _do(options, parser)
    except LpsnError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


def _do(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if options.prepare:
        from benchmarks import kernel_cases

        kernel_cases.prepare(options.prepare, options.archs, options.recorded, options.limit_per_family)
    elif options.kit is None:
        parser.error("--prepare or --kit is needed")
    elif options.worker:
        names = json.loads(Path(options.worker).read_text())
        guards = not options.separate
        work(options.kit, names, options.worker_arch, options.device, options.limit, has_guards=guards)
    elif options.list:
        for family, paths in kernel_kit.by_family(kernel_kit.paths(options.kit)).items():
            print(f"{family:44s} {len(paths):4d}")
    else:
        raise SystemExit(1 if run(options) else 0)


if __name__ == "__main__":
    main()
