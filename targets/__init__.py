"""Backends: what a target is, how operators are lowered to it, how it is compiled."""

from lpsn_tvm.targets.backend import Backend, Compiled, Parts, get_backend

__all__ = ["Backend", "Compiled", "Parts", "get_backend"]
