"""The file that a module is saved in: a zip of `manifest.json`, binary members, and `digest.txt` (SHA-256 of those).

Written atomically, and read only as a whole after every digest has been compared.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lpsn_tvm.errors import ArtifactError

FORMAT = 1
MANIFEST, DIGESTS = "manifest.json", "digest.txt"


def write_container(path: Path, manifest: Mapping[str, Any], members: Mapping[str, bytes]) -> None:
    """Write one file, atomically: either the whole new file is there or the old one is untouched.

    Raises
    ------
    ArtifactError
        If the folder is missing or not writable.
    """
    contents = {MANIFEST: json.dumps({"format": FORMAT, **manifest}, indent=1).encode(), **members}
    digests = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in contents.items())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in (*contents.items(), (DIGESTS, digests.encode())):
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    write_atomically(path, buffer.getvalue())


def read_container(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(manifest, members by name) of a saved module.

    Raises
    ------
    ArtifactError
        If the file is missing, truncated, altered, or of a newer format.
    """
    where = str(path)
    contents = _read(path, where)
    lines = [line.partition("  ") for line in contents.pop(DIGESTS).decode("ascii", "replace").splitlines()]
    expected = {name: digest for digest, _, name in lines}
    for name, data in contents.items():
        if expected.get(name) != hashlib.sha256(data).hexdigest():
            raise ArtifactError(f"has a wrong digest for {name}: the file was altered or damaged", where=where)
    lost = sorted(set(expected) - set(contents))
    if lost:
        raise ArtifactError(f"has lost {lost[0]}: the file was altered or damaged", where=where)
    try:
        manifest = dict(json.loads(contents.pop(MANIFEST)))
        version = int(manifest["format"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"is not a valid module file ({type(error).__name__}: {error})", where=where) from error
    if version > FORMAT:
        raise ArtifactError(
            f"has format {version}; this version of lpsn_tvm reads up to {FORMAT}: upgrade the package", where=where
        )
    return manifest, contents


def _read(path: Path, where: str) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        missing = [name for name in (MANIFEST, DIGESTS) if name not in contents]
        if missing:
            raise KeyError(f"there is no {missing[0]} in it")
        return contents
    except FileNotFoundError as error:
        raise ArtifactError("does not exist", where=where) from error
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror or error}", where=where) from error
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, NotImplementedError) as error:
        raise ArtifactError(f"is not a module file or is truncated ({error})", where=where) from error
    except Exception as error:  # zlib.error and its like have no common base
        raise ArtifactError(f"is damaged ({error})", where=where) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary file beside `path`, then rename; ArtifactError if that is not possible."""
    if path.is_dir():
        raise ArtifactError("is a folder; give a file name", where=str(path))
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise ArtifactError(f"cannot be written: {error.strerror or error}", where=str(path)) from error
    finally:
        # Also after Ctrl-C: nothing half-written stays behind.
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
