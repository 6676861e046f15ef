"""`Backend`: what a target is, as data; and `get_backend`, which finds one by name or target string."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lpsn_tvm.errors import TargetError
from lpsn_tvm.quant import QuantScheme
from lpsn_tvm.schedules.kernel import Builder


@dataclass(frozen=True)
class Compiled:
    """A compiled module: shared library, the constants that `main` takes as its last argument (a tuple), and the CPU
    features it needs.
    """

    library: bytes
    params: tuple[npt.NDArray[Any], ...]
    cpu_features: tuple[str, ...] = ()


@dataclass(frozen=True)
class Backend:
    """A target.

    Parameters
    ----------
    name : str
        "llvm", ...
    tvm_target : str
        TVM target as JSON.
    scheme : QuantScheme
        The integer arithmetic that the hardware wants.
    channel_tile : int
        Kept channel counts should be multiples of this.
    rules : mapping of str to tuple of builders
        Operator ("lpsn.conv2d") -> kernel builders, asked in order; one that returns None passes.
    geometry : object
        What schedules need to know about the hardware (llvm: `Isa`).
    """

    name: str
    tvm_target: str
    scheme: QuantScheme
    channel_tile: int
    rules: Mapping[str, tuple[Builder, ...]] = field(repr=False)
    geometry: Any
    lowering: Callable[[Backend, Any], Any] = field(repr=False)
    compiler: Callable[[Backend, Any], Compiled] = field(repr=False)

    @property
    def target(self) -> Any:
        """The `tvm.target.Target`."""
        import tvm

        return tvm.target.Target(json.loads(self.tvm_target))

    def lower(self, mod: Any) -> Any:
        """Every lpsn operator becomes a call of a scheduled kernel in the layout that the backend wants; inputs and
        outputs stay as they are.

        Raises
        ------
        CompileError
            An operator has no kernel on this backend; names the operator and the variable.
        """
        return self.lowering(self, mod)

    def compile(self, mod: Any) -> Compiled:
        """Compile a lowered module (a module with lpsn operators is lowered first); how many threads run it is the
        runtime's business.
        """
        return self.compiler(self, mod)


def get_backend(target: Any) -> Backend:
    """The backend of a name, a target string, a dictionary or a `tvm.target.Target`; a `Backend` is returned as it is.

    "llvm" means this machine's CPU; "llvm -mcpu=cascadelake -mattr=-avx512vbmi" another one.

    Raises
    ------
    TargetError
        Unknown kind or CPU; lists what is known.
    """
    if isinstance(target, Backend):
        return target
    config = parse_target(target)
    kind = str(config.get("kind", ""))
    if kind != "llvm":
        raise TargetError(f"unknown target kind {kind!r}; known: llvm", where=str(target))
    from lpsn_tvm.targets.llvm import llvm_backend

    return llvm_backend(config)


def parse_target(target: Any) -> dict[str, Any]:
    """Target string (`llvm -mcpu=x`, or JSON), dictionary or `tvm.target.Target` -> dictionary for `tvm.target.Target`.

    Raises
    ------
    TargetError
        If it cannot be read.
    """
    if isinstance(target, Mapping):
        return dict(target)
    if not isinstance(target, str):
        if not hasattr(target, "kind") or not hasattr(target, "attrs"):
            raise TargetError(f"a target is a string, a dictionary or a Backend, not {type(target).__name__}")
        return dict(json.loads(str(target)))
    text = target.strip()
    if text.startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise TargetError(f"is not valid JSON: {error}", where=text) from error
    kind, *options = text.split()[:1] + text.split()[1:] if text else [""]
    config: dict[str, Any] = {"kind": kind}
    for option in options:
        name, separator, value = option.lstrip("-").partition("=")
        if not option.startswith("-") or not separator:
            raise TargetError(f"{option!r} is not of the form -name=value", where=text)
        config[name] = (
            value.split(",")
            if name == "mattr"
            else int(value)
            if name == "num-cores" and np.char.isdigit(value)
            else value
        )
    return config
