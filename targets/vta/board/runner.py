"""Runs a bundle of lpsn_tvm on a board.

In Python, `runner = Runner("bundle.zip", bitstream="vta.bit"); y = runner(x)`; on the command line:

    sudo python3 runner.py --bitstream vta.bit --self-test
    sudo python3 runner.py --bitstream vta.bit --input x.npy --output y.npy

Needs Python >= 3.8, numpy and pynq. Before anything else runs, a self-test makes sure that the bitstream speaks the
instruction set that the bundle was compiled for.
"""

# ruff: noqa: B905, UP006, UP035, UP045  (runs on Python 3.8)
from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import zipfile
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import numpy as np

_PREFIX = __package__ + "." if __package__ else ""
bundle_files = importlib.import_module(_PREFIX + "bundle")
host_library = importlib.import_module(_PREFIX + "host_library")
host_ops = importlib.import_module(_PREFIX + "host_ops")
pynq_board = importlib.import_module(_PREFIX + "pynq_board")
BoardError, BoardTimeout = pynq_board.BoardError, pynq_board.BoardTimeout
LoadedProgram, array_of = bundle_files.LoadedProgram, bundle_files.array_of

PROBE_SECONDS = 0.5


class Runner:
    """A network on a board.

    Parameters
    ----------
    bundle : str
        Folder or zip file.
    bitstream : str
        .bit file; not needed with `board`.
    board : callable, optional
        Configuration -> what stands for the board (`load`, `allocate`, `execute` as `PynqBoard`): a simulator, say.
    timeout : float
        Seconds that a program may take.
    compiled : bool
        Use the C library of host operations where there is one.
    modules : tuple, optional
        (quant, float_ops, host_steps, layout) instead of the bundle's own.

    Raises
    ------
    BoardError
        With one line that says what is wrong and what to do.
    """

    def __init__(
        self,
        bundle: str,
        bitstream: Optional[str] = None,
        *,
        board: Optional[Callable[[Any], Any]] = None,
        timeout: float = 10.0,
        compiled: bool = True,
        modules: Optional[Tuple[Any, ...]] = None,
    ) -> None:
        self.bundle = bundle_files.Bundle(bundle)
        self.timeout = timeout
        self.times: List[Tuple[str, float]] = []
        """(step, milliseconds) of the last run: "device" or the host operator."""
        self._operations(modules, compiled)
        if board is None and not bitstream:
            raise BoardError("a bitstream (.bit file) is needed")
        self.board = pynq_board.PynqBoard(self.bundle.config, bitstream) if board is None else board(self.bundle.config)
        self.board.load()
        self.check_hardware()
        files, steps = self.bundle.files, self.bundle.network["steps"]
        self._programs = {
            index: LoadedProgram(self.board, step, files, self.bundle.config)
            for index, step in enumerate(steps)
            if step["kind"] == "device"
        }
        for step in steps:
            for tensor in [*step["inputs"], *step["outputs"]] if step["kind"] == "device" else []:
                tensor["layout"] = self._layout(tensor["layout"])
        self._constants = {
            index: {name: array_of(entry, files) for name, entry in step["constants"].items()}
            for index, step in enumerate(steps)
            if step["kind"] == "host"
        }

    def _operations(self, modules: Optional[Tuple[Any, ...]], compiled: bool) -> None:
        if modules is None:
            for name in [name for name in sys.modules if name.startswith("lpsn_") and "." not in name]:
                if name != "lpsn_tvm":
                    del sys.modules[name]  # another bundle's
            sys.path.insert(0, self.bundle.folder)
            try:
                names = ("lpsn_quant", "lpsn_float_ops", "lpsn_host_steps", "lpsn_layout")
                modules = tuple(importlib.import_module(name) for name in names)
            finally:
                sys.path.remove(self.bundle.folder)
        *arithmetic, self._layouts = modules
        operators = {name: function for module in arithmetic for name, function in module.OPERATORS.items()}
        library = host_library.open_library(self.bundle.folder) if compiled else None
        self.ops = host_ops.HostOps(operators, library, arithmetic[0].integer_multiplier)

    # --- self-test

    def check_hardware(self) -> None:
        """Find out whether the bitstream speaks the bundle's instruction set, without a store to a wrong address.

        The two versions differ in the place of the address field: a program of the other version would store to half
        or twice its addresses, into memory of the operating system. So a probe goes first that stores nothing and
        that ends on version 0.0.1 only: version 0.0.2 hands one of its instructions to another unit and waits for it
        for ever, until the bitstream is loaded again.
        """
        wanted = self.bundle.config["isa_version"]
        speaks_1 = self._probe()
        if not speaks_1:
            self.board.load()
        found = "0.0.1" if speaks_1 else "0.0.2"
        problem = self._known_answer(found)
        if problem is not None:
            raise BoardError(self._wrong(problem))
        if found != wanted:
            preset = self.bundle.manifest["presets"].get(found)
            again = (
                f'target="vta -preset={preset}"'
                if preset
                else f'target="vta -config=vta_config.json" and "isa_version": "{found}" in that file'
            )
            raise BoardError(
                f"this bitstream speaks instruction set {found}, the bundle was compiled for {wanted}: build again with"
                f" {again}, or load a bitstream of version {wanted}"
            )

    def _test_program(self, name: str, version: str) -> Any:
        config = {**self.bundle.config, "isa_version": version}
        return LoadedProgram(self.board, self.bundle.network["selftest"][name], self.bundle.files, config)

    def _probe(self) -> bool:
        try:
            self._test_program("probe", "0.0.1").run(PROBE_SECONDS)
        except BoardTimeout:
            return False
        return True

    def _known_answer(self, version: str) -> Optional[str]:
        """None, or what was wrong with the small program of that version. It runs twice: a `done` left over from the
        first run would let the second be read too early.
        """
        program = self._test_program(version, version)
        expected = np.frombuffer(self.bundle.files[self.bundle.network["selftest"]["expected"]], np.uint8)
        output = program.regions["output"]
        for _ in range(2):
            output.write(np.full(expected.size, 0x55, np.uint8).tobytes())
            try:
                program.run(min(self.timeout, 2.0))
            except BoardTimeout as error:
                return str(error)
            wrong = int(np.count_nonzero(output.read() != expected))
            if wrong:
                return f"{wrong} of {expected.size} bytes of the known answer are wrong"
        return None

    def _wrong(self, problem: str) -> str:
        return (
            f"self-test failed: {problem}. The bundle is for {self.bundle.manifest['configuration']} on"
            f" {self.bundle.config['TARGET']} at {self.bundle.config['clock_mhz']:g} MHz: load a bitstream of exactly"
            " this configuration (vta_config.json), see README.md"
        )

    def self_test(self) -> List[str]:
        """Check the whole network on the input that came with the bundle; lines that say what was checked.

        Raises
        ------
        BoardError
            The network's outputs are not those that the bundle was exported with.
        """
        version, lines = self.bundle.config["isa_version"], []
        lines.append(f"ok: the bitstream speaks instruction set {version} and computes the known answer")
        lines.append(f"ok: host operations in {'C' if self.ops.library is not None else 'numpy'}")
        results = self.run(self.known_inputs())
        for name, entry in self.bundle.network["known_answer"]["outputs"].items():
            self._compare(name, results[name], array_of(entry, self.bundle.files))
        lines.append(f"ok: the network gives the {len(results)} output(s) that it gave when it was exported")
        return lines

    def known_inputs(self) -> Dict[str, Any]:
        """The sample that came with the bundle."""
        inputs = self.bundle.network["known_answer"]["inputs"]
        return {name: array_of(entry, self.bundle.files) for name, entry in inputs.items()}

    def _compare(self, name: str, result: Any, expected: Any) -> None:
        # The C library's exp may round differently from numpy's; everything else is exact.
        if result.shape != expected.shape or not np.allclose(result, expected, rtol=1e-6, atol=1e-7):
            far = float(np.max(np.abs(result - expected))) if result.shape == expected.shape else float("nan")
            raise BoardError(
                f"self-test failed: output {name!r} differs from the exported one by up to {far:g}, although the small"
                " program was right: try timing (a lower clock_mhz), power supply, and --numpy; see README.md"
            )

    # --- running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network on arrays [N, ...], positional or by input name; any N. One array, or a dict by name."""
        infos = self.bundle.network["inputs"]
        given = (
            dict(args[0])
            if len(args) == 1 and isinstance(args[0], dict)
            else dict(zip([i["name"] for i in infos], args))
        )
        given.update(kwargs)
        if set(given) != {info["name"] for info in infos} or len(args) > len(infos):
            raise BoardError(f"expected inputs {[info['name'] for info in infos]}, got {sorted(given)}")
        feeds = {info["name"]: _input(given[info["name"]], info) for info in infos}
        counts = {array.shape[0] for array in feeds.values()}
        if len(counts) != 1:
            raise BoardError("all inputs must have the same batch size")
        count, batch = counts.pop(), infos[0]["shape"][0]
        parts = [self._piece(feeds, start, batch) for start in range(0, count, batch)]
        results = {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}
        return next(iter(results.values())) if len(results) == 1 else results

    def _piece(self, feeds: Mapping[str, Any], start: int, batch: int) -> Dict[str, Any]:
        """One batch of the compiled size; the last sample is repeated where some are missing."""
        pieces = {name: array[start : start + batch] for name, array in feeds.items()}
        return self.run(
            {n: np.concatenate([a, np.repeat(a[-1:], batch - a.shape[0], axis=0)]) for n, a in pieces.items()}
        )

    def run(self, feeds: Mapping[str, Any]) -> Dict[str, Any]:
        """Outputs by name, for inputs of exactly the compiled shapes."""
        values = Values(feeds, self.ops)
        packed: Dict[str, Any] = {}
        self.times = []
        for index, step in enumerate(self.bundle.network["steps"]):
            begin = time.perf_counter()
            if step["kind"] == "host":
                constants = self._constants[index]
                operands = [constants[name] if name in constants else values[name] for name in step["inputs"]]
                values[step["output"]] = self.ops.run(step["op"], operands, step["attrs"])
                self.times.append((step["op"], (time.perf_counter() - begin) * 1e3))
                continue
            seconds = self._run_program(self._programs[index], step, values, packed)
            self.times.append(("device", seconds * 1e3))
            self.times.append(("copy", (time.perf_counter() - begin - seconds) * 1e3))
        names = self.bundle.network["output_names"]
        return {name: values[value] for name, value in zip(names, self.bundle.network["outputs"])}

    def _run_program(self, program: Any, step: Any, values: Values, packed: Dict[str, Any]) -> float:
        """Write the inputs, run, read the outputs; equal tensor names in two programs are the same bytes."""
        for tensor in step["inputs"]:
            if tensor["name"] not in packed:
                packed[tensor["name"]] = self.ops.pack(tensor["layout"], values[tensor["value"]])
            program.regions[tensor["region"]].write(packed[tensor["name"]], tensor["offset"])
        seconds = float(program.run(self.timeout))
        for tensor in step["outputs"]:
            layout = tensor["layout"]
            data = program.regions[tensor["region"]].read()[tensor["offset"] : tensor["offset"] + layout.size]
            packed[tensor["name"]] = data
            if not hasattr(layout, "lanes"):
                values.left(tensor["value"], layout, data)
        return seconds

    def _layout(self, record: Mapping[str, Any]) -> Any:
        """The layout that a record of the bundle describes; lists become tuples."""
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items() if k != "type"}
        if "lanes" in fields:
            lane = self._layouts.Lane
            fields["lanes"] = tuple(
                None if x is None else lane(x["channel"], x["dy"], x["dx"], x["part"]) for x in fields["lanes"]
            )
        return getattr(self._layouts, record["type"])(**fields)


class Values(Dict[str, Any]):
    """Values by name; what a program left is unpacked when somebody asks for it."""

    def __init__(self, feeds: Mapping[str, Any], ops: Any) -> None:
        super().__init__(feeds)
        self._ops = ops
        self._left: Dict[str, Tuple[Any, Any]] = {}

    def left(self, name: str, layout: Any, data: Any) -> None:
        """A program left a value in a layout."""
        self.pop(name, None)
        self._left[name] = layout, data

    def __missing__(self, name: str) -> Any:
        self[name] = self._ops.unpack(*self._left[name])
        return self[name]


def _input(value: Any, info: Mapping[str, Any]) -> Any:
    array = np.asarray(value)
    if array.dtype.kind not in "fiub" or array.shape[1:] != tuple(info["shape"][1:]) or not array.shape[:1]:
        wanted = ["N", *info["shape"][1:]]
        raise BoardError(
            f"input {info['name']!r} must be numbers of shape {wanted}, got {array.dtype}{list(array.shape)}"
        )
    if array.shape[0] == 0:
        raise BoardError(f"input {info['name']!r} is empty")
    return np.ascontiguousarray(array, info["dtype"])


def main(arguments: Optional[List[str]] = None) -> int:
    """Command line; errors are one line and exit status 2."""
    parser = argparse.ArgumentParser(description="Run a network on the accelerator of this board.")
    here = os.path.dirname(os.path.abspath(__file__))
    parser.add_argument("--bundle", default=here, help="folder or zip file (default: where this file lies)")
    parser.add_argument("--bitstream", required=True, help=".bit file of the accelerator")
    parser.add_argument("--input", help=".npy (one input) or .npz (by input name)")
    parser.add_argument("--output", help=".npy (one output) or .npz")
    parser.add_argument("--self-test", action="store_true", help="check the network on the bundle's own input")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds that a program may take")
    parser.add_argument("--numpy", action="store_true", help="host operations in numpy instead of C")
    options = parser.parse_args(arguments)
    try:
        runner = Runner(options.bundle, options.bitstream, timeout=options.timeout, compiled=not options.numpy)
        if options.self_test or options.input is None:
            print("\n".join(runner.self_test()))
        if options.input is not None:
            _run_files(runner, options.input, options.output)
    except BoardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run_files(runner: Runner, source: str, target: Optional[str]) -> None:
    try:
        data = np.load(source, allow_pickle=False)
        feeds = data if isinstance(data, np.ndarray) else {name: data[name] for name in data.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BoardError(f"{source} cannot be read as .npy or .npz: {error}") from error
    result = runner(feeds)
    device = sum(ms for name, ms in runner.times if name == "device")
    total = sum(ms for _, ms in runner.times)
    print(f"accelerator {device:.3f} ms, host and copies {total - device:.3f} ms per batch")
    if target is None:
        print(result)
        return
    try:
        if isinstance(result, dict):
            np.savez(target, **result)
        else:
            np.save(target, result)
    except OSError as error:
        raise BoardError(f"{target} cannot be written: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
