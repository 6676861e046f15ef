"""`export_pynq`: a network as one zip file that a PYNQ board runs.

runner.py, pynq_board.py, bundle.py    Python >= 3.8, numpy, pynq
host_ops.py, host_ops.c, host_ops-*.so host operations in C; lpsn_*.py: the same in numpy
network.json, program*/, host*/        steps, relocatable programs, weights, constants
selftest/, known/                      small programs with known answers, one sample with its outputs
vta_config.json, README.md, manifest.json (SHA-256 of every file)
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt

from lpsn_tvm.container import write_atomically
from lpsn_tvm.errors import ArtifactError, TargetError
from lpsn_tvm.targets.vta.board.bundle import FORMAT, MANIFEST, NETWORK
from lpsn_tvm.targets.vta.board.host_library import CFLAGS
from lpsn_tvm.targets.vta.board_sources import board_modules
from lpsn_tvm.targets.vta.config import PREBUILT, PRESETS, VtaConfig
from lpsn_tvm.targets.vta.network import VtaNetwork
from lpsn_tvm.targets.vta.selftest import known_answer, probe
from lpsn_tvm.targets.vta.serialize import network_to_files, program_to_files

Array = npt.NDArray[Any]
BOARD_FILES = ("runner.py", "pynq_board.py", "bundle.py", "host_library.py", "host_ops.py", "host_ops.c")
VERSIONS = ("0.0.1", "0.0.2")
CROSS_COMPILERS: dict[str, tuple[str, ...]] = {
    "armv7": ("arm-linux-gnueabihf-gcc", "-march=armv7-a", "-mfpu=neon"),
    "aarch64": ("aarch64-linux-gnu-gcc",),
}
"""Machine of the board -> compiler and its options."""


def export_pynq(
    network: VtaNetwork,
    path: str | os.PathLike[str],
    *,
    sample: Mapping[str, Array] | Array | None = None,
    output_names: Sequence[str] | None = None,
    title: str = "network",
) -> Path:
    """Write a bundle, atomically.

    Parameters
    ----------
    network : VtaNetwork
        Programs and host steps.
    path : path
        Zip file to write.
    sample : array or mapping of input name to array [N, ...], optional
        What the board's self-test runs, one batch; its outputs are computed here by the simulator. Default: noise.
    output_names : sequence of str, optional
        Names of the outputs for the user, in order (default: those of the values).
    title : str
        Name of the network, for the README.

    Raises
    ------
    ArtifactError
        The file cannot be written, or the sample does not fit the inputs.
    """
    record, members = network_to_files(network)
    for step in record["steps"]:
        for key in ("ops", "schedules"):  # what the compiler knew; a board does not need it
            step.pop(key, None)
    names = list(output_names or network.outputs)
    record["output_names"] = names
    record["selftest"] = _self_test(network.config, members)
    record["known_answer"] = _known_answer(network, _sample(network, sample), names, members)
    members[NETWORK] = json.dumps(record).encode()
    members["vta_config.json"] = (json.dumps(network.config.to_json(), indent=2) + "\n").encode()
    members |= _board_files()
    members["README.md"] = _readme(network, title, names).encode()
    members[MANIFEST] = (json.dumps(_manifest(network.config, title, members), indent=1) + "\n").encode()
    write_atomically(Path(path), _zip(members))
    return Path(path)


def _manifest(config: VtaConfig, title: str, members: Mapping[str, bytes]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "package": "lpsn_tvm",
        "title": title,
        "configuration": config.name,
        "presets": _presets(config),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in members.items()},
    }


def _zip(members: Mapping[str, bytes]) -> bytes:
    """The archive; the same members give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o644 << 16
            archive.writestr(info, data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _board_files() -> dict[str, bytes]:
    """What runs on the board: shipped files, generated modules, compiled host operations."""
    folder = files("lpsn_tvm.targets.vta.board")
    members = {name: folder.joinpath(name).read_bytes() for name in BOARD_FILES}
    members |= {name: text.encode() for name, text in board_modules().items()}
    for machine, command in CROSS_COMPILERS.items():
        library = compile_host_ops(command, members["host_ops.c"])
        if library is not None:
            members[f"host_ops-{machine}.so"] = library
    return members


@lru_cache
def compile_host_ops(command: tuple[str, ...], source: bytes) -> bytes | None:
    """The shared library, or None where the compiler is missing or fails: the board then compiles it or uses numpy."""
    if shutil.which(command[0]) is None:
        return None
    with tempfile.TemporaryDirectory(prefix="host_ops.") as name:
        folder = Path(name)
        (folder / "host_ops.c").write_bytes(source)
        arguments = [*command, *CFLAGS, "-s", "host_ops.c", "-o", "host_ops.so", "-lm"]
        done = subprocess.run(arguments, cwd=folder, capture_output=True, check=False)
        return (folder / "host_ops.so").read_bytes() if done.returncode == 0 else None


def _self_test(config: VtaConfig, members: dict[str, bytes]) -> dict[str, Any]:
    """Programs that tell the instruction set versions apart, and the answer that they must give."""
    record: dict[str, Any] = {}
    programs = {"probe": probe(_with_version(config, "0.0.1"))}
    for version in VERSIONS:
        programs[version], answer = known_answer(_with_version(config, version))
        members["selftest/expected.bin"] = answer
    for name, program in programs.items():
        record[name] = program_to_files(program, f"selftest/{name}", members)
    return record | {"expected": "selftest/expected.bin"}


def _with_version(config: VtaConfig, version: str) -> VtaConfig:
    return config if config.isa_version == version else replace(config, isa_version=version)  # type: ignore[arg-type]


def _sample(network: VtaNetwork, sample: Mapping[str, Array] | Array | None) -> dict[str, Array]:
    """One batch for every input: the first of the samples, the last one repeated where there are fewer."""
    rng = np.random.default_rng(0)
    if sample is not None and not isinstance(sample, Mapping):
        sample = {network.inputs[0].name: np.asarray(sample)}
    feeds = {}
    for info in network.inputs:
        given = np.asarray(rng.standard_normal(info.shape) if sample is None else sample.get(info.name))
        if given.shape[1:] != info.shape[1:] or given.ndim != len(info.shape) or not given.size:
            wanted = ("N", *info.shape[1:])
            raise ArtifactError(f"the sample must have shape {wanted}, got {given.shape}", where=f"input {info.name!r}")
        rows = np.minimum(np.arange(info.shape[0]), given.shape[0] - 1)
        feeds[info.name] = np.ascontiguousarray(given[rows], info.dtype)
    return feeds


def _known_answer(
    network: VtaNetwork, feeds: Mapping[str, Array], names: Sequence[str], members: dict[str, bytes]
) -> dict[str, Any]:
    """The sample and what the simulator makes of it."""
    from lpsn_tvm.targets.vta.execute import execute

    values = execute(network, feeds, model=None).outputs
    outputs = {name: values[value] for name, value in zip(names, network.outputs, strict=True)}
    record: dict[str, Any] = {}
    for kind, arrays in (("inputs", feeds), ("outputs", outputs)):
        record[kind] = {}
        for index, (name, array) in enumerate(arrays.items()):
            file = f"known/{kind}{index}.bin"
            members[file] = np.ascontiguousarray(array).tobytes()
            record[kind][name] = {"shape": list(array.shape), "dtype": str(array.dtype), "file": file}
    return record


def _presets(config: VtaConfig) -> dict[str, str]:
    """Instruction set version -> preset of this geometry, where there is one."""
    found: dict[str, str] = {}
    for version in VERSIONS:
        try:
            wanted = _with_version(config, version)
        except TargetError:
            continue
        names = [name for name, preset in PRESETS.items() if preset == wanted]
        if names:
            found[version] = names[0]
    return found


def _readme(network: VtaNetwork, title: str, output_names: Sequence[str]) -> str:
    config = network.config
    if any(PRESETS[name] == config for name in PREBUILT):
        place = f"bitstreams/{config.hardware}/{config.isa_version}/{config.name}.bit"
        source = f"It is published ready-made: `{place}` of https://github.com/uwsampl/vta-distro."
    else:
        source = (
            "Nobody publishes it ready-made: build it from the public VTA hardware sources"
            " (https://github.com/apache/tvm-vta) with the `vta_config.json` of this bundle."
        )
    inputs = ", ".join(f"`{info.name}` {info.dtype}{list(info.shape)}" for info in network.inputs)
    host = [f"* `{step.output}`: {step.op.partition('.')[2]}. {step.reason}" for step in network.host_steps]
    template = files("lpsn_tvm.targets.vta.board").joinpath("README.md").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=title,
        configuration=config.name,
        isa_version=config.isa_version,
        other_version=next(version for version in VERSIONS if version != config.isa_version),
        hardware=config.hardware,
        clock=f"{config.clock_mhz:g}",
        bitstream=source,
        inputs=inputs,
        outputs=", ".join(f"`{name}`" for name in output_names),
        programs=len(network.device_steps),
        host="\n".join(host) or "* none",
    )
