"""From an ONNX model to raw Relax: `load_model` (checked, static, simplified) and `import_model`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lpsn_tvm.frontend.importer import ImportedModel, import_model
    from lpsn_tvm.frontend.load import load_model

__all__ = ["ImportedModel", "import_model", "load_model"]


def __getattr__(name: str) -> Any:
    """Import on first use: loading a model must not import TVM."""
    if name == "load_model":
        from lpsn_tvm.frontend.load import load_model

        return load_model
    if name in ("ImportedModel", "import_model"):
        from lpsn_tvm.frontend import importer

        return getattr(importer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
