"""A linked program as a directory that any simulator or loader can run: `program.json` beside binary files.

    program.json        configuration, addresses, regions, expected outputs, predicted cycles
    vta_config.json     the whole configuration, for whoever builds or picks the bitstream
    insn.bin, uop.bin, weight.bin, ...         what memory holds before the start
    expected_output.bin, ...                   what it must hold afterwards

All addresses are physical bytes below 2**32, the base registers of the accelerator are 0, nothing is left to relocate.
Values narrower than a byte are packed little-endian, lowest bits first.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lpsn_tvm.errors import ArtifactError, LpsnError, TargetError
from lpsn_tvm.targets.vta.config import VtaConfig
from lpsn_tvm.targets.vta.program import ADDRESS_LIMIT, INSTRUCTIONS, LinkedProgram, LinkedRegion
from lpsn_tvm.targets.vta.program_rules import check_memory

PROGRAM = "program.json"
CONFIG = "vta_config.json"
NETWORK = "network.json"
_OWN_FILE = re.compile(r"(program|vta_config|network)\.json|.*\.(bin|npy)|[0-9]+_.*")
_REGION_KEYS = ("addr", "size", "file", "access")
_PROGRAM_KEYS = ("config", "insn_addr", "insn_count", "regions", "expected", "cycles")


def export_program(
    linked: LinkedProgram,
    path: str | os.PathLike[str],
    expected: Mapping[str, bytes] | None = None,
    cycles: Mapping[str, int] | None = None,
    *,
    inputs: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a program directory; it appears whole or not at all.

    Parameters
    ----------
    linked : LinkedProgram
        The program at its final addresses.
    path : path
        Directory to make; an earlier export there is replaced.
    expected : mapping of region to bytes
        What the program must leave in its output regions.
    cycles : mapping of model ("rtl", "pynq") to int
        Predicted cycles.
    inputs : mapping of region to bytes
        Contents of the input regions, packed as the program reads them.

    Raises
    ------
    CompileError
        The program breaks a rule of the memory map, or reads an input that was not given.
    ArtifactError
        A region of `expected` or `inputs` does not exist or has another size; the directory cannot be written or
        holds something else.
    """
    linked = with_inputs(linked, inputs or {})
    check_memory(linked)
    with fresh_directory(Path(path)) as folder:
        write_program(linked, folder, expected or {}, cycles or {})
    return Path(path)


def with_inputs(linked: LinkedProgram, inputs: Mapping[str, bytes]) -> LinkedProgram:
    """The program with the contents of its input regions.

    Raises
    ------
    ArtifactError
        No such region, or another size.
    """
    regions = dict(linked.regions)
    for name, data in inputs.items():
        _check_size(linked, name, data, "input")
        regions[name] = replace(regions[name], data=bytes(data))
    return replace(linked, regions=regions)


def write_program(
    linked: LinkedProgram, folder: Path, expected: Mapping[str, bytes], cycles: Mapping[str, int]
) -> None:
    """The files of one program into an empty folder."""
    for name, data in expected.items():
        _check_size(linked, name, data, "expected output")
        if "w" not in linked.regions[name].access:
            raise ArtifactError("is read-only; nothing can be expected there", where=f"region {name!r}")
    files = _file_names([INSTRUCTIONS, *linked.regions])
    insn = {"addr": linked.insn_addr, "size": len(linked.insn), "file": files[INSTRUCTIONS], "access": "r"}
    regions: dict[str, dict[str, Any]] = {INSTRUCTIONS: insn}
    (folder / files[INSTRUCTIONS]).write_bytes(linked.insn)
    for name, region in linked.regions.items():
        regions[name] = {"addr": region.addr, "size": region.size, "access": region.access}
        if region.data is not None:
            regions[name]["file"] = files[name]
            (folder / files[name]).write_bytes(region.data)
    for name, data in expected.items():
        (folder / f"expected_{files[name]}").write_bytes(data)
    record = {
        "config": program_config(linked.config),
        "insn_addr": linked.insn_addr,
        "insn_count": linked.insn_count,
        "regions": regions,
        "expected": {name: f"expected_{files[name]}" for name in expected},
        "cycles": {name: int(value) for name, value in cycles.items()},
    }
    (folder / PROGRAM).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    linked.config.write(folder / CONFIG)


def program_config(config: VtaConfig) -> dict[str, Any]:
    """The configuration keys that program.json has."""
    keys = config.to_json()
    keep = [key for key in keys if key.startswith("LOG_") and key != "LOG_BLOCK"]
    return {key: keys[key] for key in (*keep, "isa_version")}


def read_program(
    path: str | os.PathLike[str], *, check: bool = True
) -> tuple[LinkedProgram, dict[str, bytes], dict[str, int]]:
    """A program directory: (program with the contents of its regions, expected outputs, cycles).

    Parameters
    ----------
    path : path
        The directory, or its program.json.
    check : bool
        Refuse a program that breaks a rule of the memory map.

    Raises
    ------
    ArtifactError
        A file is missing or of another size, a key is missing, unknown or of the wrong type, a file name leaves the
        directory, or the program breaks a rule of the memory map. The message names file and key.
    """
    folder = Path(path)
    if folder.name == PROGRAM:
        folder = folder.parent
    where = str(folder / PROGRAM)
    record = read_json(folder / PROGRAM)
    require_keys(record, _PROGRAM_KEYS, where, optional=("expected", "cycles"))
    config = _read_config(record["config"], folder, where)
    regions, insn, insn_addr = _read_regions(record, folder, where)
    linked = LinkedProgram(config, insn, insn_addr, regions)
    if check:
        try:
            check_memory(linked)
        except LpsnError as error:
            raise ArtifactError(str(error), where=where) from error
    cycles = _object(record, "cycles", where)
    expected = {}
    for name, file in _object(record, "expected", where).items():
        data = read_inside(folder, file, f"{where}: expected.{name}")
        _check_size(linked, name, data, f"{where}: expected output")
        expected[name] = data
    return linked, expected, {name: _integer(cycles, name, f"{where}: cycles") for name in cycles}


def _read_config(values: object, folder: Path, where: str) -> VtaConfig:
    """The configuration; vta_config.json, where it says the same, adds hardware and clock."""
    try:
        config = VtaConfig.from_json(values, where=f"{where}: config")
        if not (folder / CONFIG).is_file():
            return config
        whole = VtaConfig.read(folder / CONFIG)
    except TargetError as error:
        raise ArtifactError(str(error)) from error
    if program_config(whole) != program_config(config):
        raise ArtifactError(f"contradicts {CONFIG} beside it", where=f"{where}: config")
    return whole


def _read_regions(record: Mapping[str, Any], folder: Path, where: str) -> tuple[dict[str, LinkedRegion], bytes, int]:
    """Regions with their contents, the instructions and their address."""
    regions = {}
    for name, values in _object(record, "regions", where).items():
        at = f"{where}: regions.{name}"
        if not isinstance(values, dict):
            raise ArtifactError(f"expected an object, got {values!r}", where=at)
        require_keys(values, _REGION_KEYS, at, optional=("file",))
        size = _integer(values, "size", at)
        access = values["access"]
        if access not in ("r", "w", "rw"):
            raise ArtifactError(f'access must be "r", "w" or "rw", got {access!r}', where=at)
        data = read_inside(folder, values["file"], f"{at}.file") if "file" in values else None
        if data is not None and len(data) != size:
            raise ArtifactError(f"size is {size}, but {values['file']} has {len(data)} bytes", where=at)
        regions[name] = LinkedRegion(name, size, data, access, _integer(values, "addr", at))
    insn = regions.pop(INSTRUCTIONS, None)
    address, count = _integer(record, "insn_addr", where), _integer(record, "insn_count", where)
    if insn is None or insn.data is None or (insn.addr, insn.size) != (address, 16 * count):
        raise ArtifactError(
            f"region {INSTRUCTIONS!r} must have a file and be insn_count = {count} instructions of 16 bytes at "
            f"insn_addr = {address}",
            where=where,
        )
    return regions, insn.data, address


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ArtifactError if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"is not JSON: {error}", where=str(path)) from error
    if not isinstance(values, dict):
        raise ArtifactError(f"expected an object, got {type(values).__name__}", where=str(path))
    return values


def read_inside(folder: Path, name: object, where: str) -> bytes:
    """Contents of a file that must lie in the folder itself."""
    if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ArtifactError(f"expected the name of a file beside it, got {name!r}", where=where)
    path = folder / name
    try:
        if path.resolve(strict=True).parent != folder.resolve(strict=True) or not path.is_file():
            raise ArtifactError(f"{name!r} is not a file inside the directory", where=where)
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{name!r} cannot be read: {error.strerror or error}", where=where) from error


def require_keys(values: Mapping[str, Any], keys: tuple[str, ...], where: str, *, optional: tuple[str, ...]) -> None:
    """ArtifactError for a key that is missing or unknown."""
    missing = [key for key in keys if key not in values and key not in optional]
    unknown = [key for key in values if key not in keys]
    if missing or unknown:
        problem = f"missing {', '.join(missing)}" if missing else f"unknown {', '.join(map(repr, unknown))}"
        raise ArtifactError(f"{problem}; keys: {', '.join(keys)}", where=where)


def _object(values: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    found = values.get(key, {})
    if not isinstance(found, dict):
        raise ArtifactError(f"{key} must be an object, got {found!r}", where=where)
    return found


def _integer(values: Mapping[str, Any], key: str, where: str) -> int:
    found = values[key]
    if type(found) is not int or not 0 <= found <= ADDRESS_LIMIT:
        raise ArtifactError(f"{key} must be an integer from 0 to 2**32, got {found!r}", where=where)
    return found


def _check_size(linked: LinkedProgram, name: str, data: bytes, what: str) -> None:
    if name not in linked.regions:
        raise ArtifactError(f"no region {name!r}; there are {', '.join(linked.regions)}", where=what)
    if len(data) != linked.regions[name].size:
        raise ArtifactError(f"{len(data)} bytes, the region has {linked.regions[name].size}", where=f"{what} {name!r}")


def _file_names(regions: list[str]) -> dict[str, str]:
    """`<region>.bin`; a name that is none for a file is replaced."""
    names: dict[str, str] = {}
    for index, region in enumerate(regions):
        plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", region, re.ASCII)
        # Some file systems do not tell cases apart; "expected_" is for outputs.
        taken = {name.lower() for name in names.values()}
        usable = plain and not region.startswith("expected_") and f"{region}.bin".lower() not in taken
        names[region] = f"{region}.bin" if usable else f"region-{index}.bin"
    return names


@contextmanager
def fresh_directory(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write into; on success it takes the place of `path`.

    Raises
    ------
    ArtifactError
        `path` is a file, or a folder with something in it that is no export, or nothing can be written there.
    """
    check_replaceable(path)
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(dir=path.absolute().parent, prefix=f".{path.name}."))
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)
        yield folder
        _take_place(folder, path)
    except OSError as error:
        raise ArtifactError(f"cannot be written: {error.strerror or error}", where=str(path)) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def check_replaceable(path: Path) -> None:
    """ArtifactError unless `path` is free, empty, or an earlier export and nothing else."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ArtifactError("exists and is not a folder", where=str(path))
    if not path.is_dir():
        return
    names = [entry.name for entry in path.iterdir()]
    foreign = [name for name in names if not _OWN_FILE.fullmatch(name)]
    if names and (foreign or not {PROGRAM, NETWORK} & set(names)):
        shown = ", ".join(sorted(foreign or names)[:3])
        raise ArtifactError(f"holds other files ({shown}); give a new or empty folder", where=str(path))


def _take_place(folder: Path, path: Path) -> None:
    """Rename `folder` to `path`; what was there is put back if that fails, and removed otherwise."""
    if not path.exists():
        folder.rename(path)
        return
    aside = Path(tempfile.mkdtemp(dir=path.absolute().parent, prefix=f".{path.name}.old."))
    path.rename(aside / "old")
    try:
        folder.rename(path)
    except OSError:
        (aside / "old").rename(path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
