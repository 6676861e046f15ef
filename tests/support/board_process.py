"""A bundle on the fake board: the runner in a process of its own that sees numpy and the fake `pynq`, nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lpsn_tvm.targets.vta.config import VtaConfig

FAKE = Path(__file__).parent / "fake_pynq"
ROOT = Path(__file__).resolve().parents[2]
# As the published bitstreams begin.
BIT_HEADER = bytes.fromhex("00090ff00ff00ff00ff0000001") + b"a\0\x2dvta_wrapper;UserID=0XFFFFFFFF;Version=2018.3\0"


@dataclass
class Board:
    """An unpacked bundle beside a bitstream.

    Parameters
    ----------
    folder : Path
        `bundle/`, `vta.bit` and `log` lie in it.
    config : VtaConfig
        Of the bitstream.
    options : mapping
        Further options of the fake `pynq`; None: there is no such module.
    """

    folder: Path
    config: VtaConfig
    options: Mapping[str, Any] | None

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def log(self) -> list[str]:
        file = self.folder / "log"
        return file.read_text().splitlines() if file.exists() else []

    def run(
        self, *arguments: str, python: str = sys.executable, compiled: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """`runner.py --bitstream vta.bit ...`; host operations in numpy unless `compiled`."""
        arguments = (*arguments, *(() if compiled else ("--numpy",)))
        return self.start(
            [str(self.bundle / "runner.py"), "--bitstream", str(self.folder / "vta.bit"), *arguments], python
        )

    def script(self, text: str) -> subprocess.CompletedProcess[str]:
        """Python code beside the bundle, `runner` importable."""
        return self.start(["-c", f"import sys; sys.path.insert(0, {str(self.bundle)!r})\n{text}"], sys.executable)

    def start(self, arguments: list[str], python: str) -> subprocess.CompletedProcess[str]:
        paths, environment = [], {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
        if python == sys.executable:
            arguments = ["-S", *arguments]
            paths.append(str(_numpy_alone(self.folder)))
        if self.options is not None:
            paths.append(str(FAKE))
            options = {"python": sys.executable, "config": self.config.to_json(), "log": str(self.folder / "log")}
            environment["FAKE_PYNQ"] = json.dumps({**options, "cwd": str(ROOT), **self.options})
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        return subprocess.run(
            [python, *arguments],
            env=environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def tamper(self, name: str, old: str, new: str) -> None:
        """Change a file of the bundle and its digest."""
        file, manifest = self.bundle / name, self.bundle / "manifest.json"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
        record = json.loads(manifest.read_text())
        record["sha256"][name] = hashlib.sha256(file.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(record))


def board(archive: Path, folder: Path, config: VtaConfig, *, part: str = "7z020clg484", **options: Any) -> Board:
    """`archive` unpacked into `folder`, beside a bitstream of `config` for a chip."""
    with zipfile.ZipFile(archive) as bundle:
        bundle.extractall(folder / "bundle")
    (folder / "vta.bit").write_bytes(BIT_HEADER + b"b\0\x0c" + part.encode() + b"\0c\0\x0b2026/01/01\0")
    return Board(folder, config, options)


def _numpy_alone(folder: Path) -> Path:
    """A folder with numpy and nothing else to put on the path."""
    alone, site = folder / "numpy_alone", Path(np.__file__).parents[1]
    if not alone.exists():
        alone.mkdir()
        for name in ("numpy", "numpy.libs"):
            if (site / name).exists():
                (alone / name).symlink_to(site / name)
    return alone
