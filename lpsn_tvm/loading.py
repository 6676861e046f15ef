"""`load`: a saved module of any kind."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from lpsn_tvm.artifact import Artifact
from lpsn_tvm.container import read_container
from lpsn_tvm.errors import ArtifactError

KINDS = {
    "library": ("lpsn_tvm.library_artifact", "LibraryArtifact"),
    "cuda": ("lpsn_tvm.targets.cuda_artifact", "CudaArtifact"),
    "vta": ("lpsn_tvm.targets.vta.artifact", "VtaArtifact"),
}
"""Kind in the manifest -> module and class, imported only when such a file is read."""


def load(path: str | os.PathLike[str]) -> Artifact:
    """Read a saved module; needs no compiler, and only what the kind needs to run.

    Raises
    ------
    ArtifactError
        If the file is missing, truncated, altered, of a newer format or of an unknown kind, or if this machine cannot
        run it.
    """
    where = str(path)
    manifest, members = read_container(Path(path))
    kind = manifest.get("kind", "library")
    if kind not in KINDS:
        raise ArtifactError(
            f"holds a module of kind {kind!r}; known: {', '.join(KINDS)}: upgrade the package", where=where
        )
    module, name = KINDS[kind]
    try:
        artifact: Artifact = getattr(importlib.import_module(module), name).unpack(manifest, members, where)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"is not a valid module file ({type(error).__name__}: {error})", where=where) from error
    return artifact
