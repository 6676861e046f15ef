"""A bundle's files, and its programs in the memory of the accelerator. Needs Python >= 3.8 and numpy."""

# ruff: noqa: UP006, UP035  (runs on Python 3.8)
from __future__ import annotations

import hashlib
import importlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, Dict, List

import numpy as np

_PREFIX = __package__ + "." if __package__ else ""
BoardError = importlib.import_module(_PREFIX + "pynq_board").BoardError

FORMAT = 1
MANIFEST, NETWORK = "manifest.json", "network.json"
NO_TARGET = 255
DRAM_SHIFT = {"0.0.1": 25, "0.0.2": 26}
OPCODE_STORE = 1


class Bundle:
    """An unpacked bundle whose digests have been compared.

    Parameters
    ----------
    path : str
        Folder or zip file (unpacked into a temporary folder).

    Raises
    ------
    BoardError
        A file is missing, damaged, or of a later format.
    """

    def __init__(self, path: str) -> None:
        self.folder = path
        if not os.path.isdir(path):
            self._temporary = tempfile.TemporaryDirectory(prefix="vta_bundle.")
            self.folder = self._temporary.name
            try:
                with zipfile.ZipFile(path) as archive:
                    archive.extractall(self.folder)
            except (
                OSError,
                zipfile.BadZipFile,
                zlib.error,
                EOFError,
                ValueError,
                NotImplementedError,
                RuntimeError,
            ) as error:
                raise BoardError(f"{path} is not a readable bundle: {error}") from error
        try:
            with open(os.path.join(self.folder, MANIFEST), encoding="utf-8") as file:
                self.manifest: Dict[str, Any] = json.load(file)
            version, digests = int(self.manifest["format"]), dict(self.manifest["sha256"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BoardError(f"{path} is not a bundle: {MANIFEST} is missing or damaged ({error})") from error
        if version > FORMAT:
            raise BoardError(
                f"{path} has format {version}, this runner reads up to {FORMAT}: use the bundle's own runner"
            )
        self.files: Dict[str, bytes] = {name: self._checked(name, digest) for name, digest in digests.items()}
        if NETWORK not in self.files:
            raise BoardError(f"{path} is not a bundle: its manifest has no {NETWORK}")
        self.network: Dict[str, Any] = json.loads(self.files[NETWORK].decode())
        self.config: Dict[str, Any] = self.network["config"]

    def _checked(self, name: str, digest: str) -> bytes:
        try:
            with open(os.path.join(self.folder, name), "rb") as file:
                data = file.read()
        except OSError as error:
            raise BoardError(f"the bundle lacks {name}: copy it to the board again ({error})") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise BoardError(f"the bundle's {name} was damaged: copy it to the board again")
        return data


class LoadedProgram:
    """A program in device memory, relocated.

    Parameters
    ----------
    board : PynqBoard or the like
    record : mapping
        "insn", "targets", "regions" of the bundle's JSON.
    files : mapping of name to bytes
    config : mapping
        vta_config.json of the instructions.
    """

    def __init__(self, board: Any, record: Mapping[str, Any], files: Mapping[str, bytes], config: Any) -> None:
        self.board = board
        self.regions: Dict[str, Any] = {}
        for region in record["regions"]:
            memory = board.allocate(region["size"])
            memory.write(files[region["file"]] if region["file"] else bytes(region["size"]))
            self.regions[region["name"]] = memory
        addresses = [self.regions[region["name"]].address for region in record["regions"]]
        instructions = relocated(files[record["insn"]], files[record["targets"]], addresses, config)
        self.instructions = board.allocate(len(instructions))
        self.instructions.write(instructions)
        self.count = len(instructions) // 16

    def run(self, timeout: float) -> float:
        """Seconds that it took."""
        return float(self.board.execute(self.instructions.address, self.count, timeout))


def relocated(instructions: bytes, targets: bytes, addresses: List[int], config: Mapping[str, Any]) -> bytes:
    """Instructions whose DRAM fields count from their regions -> with physical addresses.

    Parameters
    ----------
    instructions : bytes
        16 per instruction.
    targets : bytes
        Index of each instruction's region, or 255.
    addresses : list of int
        Byte address of each region.
    config : mapping
        vta_config.json: tile sizes and isa_version.
    """
    words = np.frombuffer(instructions, "<u8").reshape(-1, 2).copy()
    codes = np.frombuffer(targets, np.uint8)
    is_store = (words[:, 0] & np.uint64(7)) == OPCODE_STORE
    memory = ((words[:, 0] >> np.uint64(7)) & np.uint64(3)).astype(np.int64)
    sizes = tile_bytes(config)
    tiles = np.where(is_store, sizes["out"], np.array([sizes[name] for name in ("uop", "wgt", "inp", "acc")])[memory])
    shift = np.uint64(DRAM_SHIFT[config["isa_version"]])
    for index, address in enumerate(addresses):
        chosen = codes == index
        words[chosen, 0] += (address // tiles[chosen]).astype(np.uint64) << shift
    return words.tobytes()


def tile_bytes(config: Mapping[str, Any]) -> Dict[str, int]:
    """Bytes of one tile in each memory."""
    batch, block_in, block_out = (1 << config[f"LOG_{name}"] for name in ("BATCH", "BLOCK_IN", "BLOCK_OUT"))
    return {
        "uop": 4,
        "wgt": (block_out * block_in << config["LOG_WGT_WIDTH"]) // 8,
        "inp": (batch * block_in << config["LOG_INP_WIDTH"]) // 8,
        "acc": (batch * block_out << config["LOG_ACC_WIDTH"]) // 8,
        "out": (batch * block_out << config["LOG_OUT_WIDTH"]) // 8,
    }


def array_of(entry: Mapping[str, Any], files: Mapping[str, bytes]) -> Any:
    """The array that a record (shape, dtype, file) describes."""
    return np.frombuffer(files[entry["file"]], entry["dtype"]).reshape(entry["shape"])
