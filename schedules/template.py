"""`Template`: a kernel that can be made in several ways with equal results, and which ways there are.

A kernel builder that has a choice makes a `Template` and returns `template.kernel()`, the kernel of the default
configuration; whoever knows a better configuration of the same template (`lpsn_tvm/records.py`) calls
`template.make(config)` instead. A template says nothing of time: `features` is what a cost model may learn from.

The tuner measures in other processes and on other machines, where the network is not: there a template is made again
from its name and workload (`remake`), with constants of the right shape and any values.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cached_property
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lpsn_tvm.schedules.kernel import Kernel

Value = int | str
Config = Mapping[str, Value]
"""Knob -> value, plain JSON."""

REMAKERS: dict[str, str] = {
    "depthwise": "lpsn_tvm.schedules.cuda.depthwise:remake",
    "conv2d_mma": "lpsn_tvm.schedules.cuda.conv_template:remake",
    "conv2d_transpose_mma": "lpsn_tvm.schedules.cuda.conv_template:remake",
    "dense_mma": "lpsn_tvm.schedules.cuda.conv_template:remake",
    "conv2d_int8": "lpsn_tvm.schedules.llvm.conv_template:remake",
    "conv2d_transpose_int8": "lpsn_tvm.schedules.llvm.conv_template:remake",
    "dense_int8": "lpsn_tvm.schedules.llvm.conv_template:remake",
    "depthwise_int8": "lpsn_tvm.schedules.llvm.depthwise_int8:remake",
    "float_conv2d": "lpsn_tvm.schedules.llvm.conv2d_float:remake",
    "float_conv2d_transpose": "lpsn_tvm.schedules.llvm.conv2d_transpose_float:remake",
    "float_dense": "lpsn_tvm.schedules.llvm.dense_float:remake",
    "float_depthwise": "lpsn_tvm.schedules.llvm.depthwise_float:remake",
}
"""Template name -> "module:function"; the function makes the template from its workload."""


def _everything(config: Config) -> bool:
    return True


def _nothing(config: Config) -> tuple[float, ...]:
    return ()


@dataclass(frozen=True)
class Template:
    """The ways to make one kernel.

    Parameters
    ----------
    name : str
        Kind of kernel, a key of `REMAKERS`; by convention the first item of `Kernel.key`.
    workload : mapping
        JSON values: all that the code depends on except the knobs, and nothing that is read from constants (scales,
        zero points, clamps), so that equal layers are tuned once. Mappings with text keys, lists (or tuples), numbers,
        text, booleans and None.
    choices : mapping of knob to values
        Values in an order that means something where there is one: a mutation goes to a neighbour more often than far.
    default : Config
        What is taken without tuning; valid.
    maker : (config) -> Kernel
        The kernel with its constants packed for the configuration. Different configurations have different
        `Kernel.key`s.
    validator : (config) -> bool
        Whether a configuration of known knobs and known values fits together: divides, fits into shared memory and
        registers. Cheap: called thousands of times.
    featurizer : (config) -> tuple of float
        Numbers of equal length for all configurations: tile sizes, roofline terms, occupancy.
    """

    name: str
    workload: Mapping[str, Any]
    choices: Mapping[str, tuple[Value, ...]]
    default: Config
    maker: Callable[[Config], Kernel] = field(repr=False, compare=False)
    validator: Callable[[Config], bool] = field(default=_everything, repr=False, compare=False)
    featurizer: Callable[[Config], tuple[float, ...]] = field(default=_nothing, repr=False, compare=False)

    @cached_property
    def key(self) -> str:
        """Digest of name and workload: equal keys have equal choices and make equal code."""
        return template_key(self.name, self.workload)

    def is_valid(self, config: Config) -> bool:
        """Whether the configuration has exactly the template's knobs, values they offer, and fits together."""
        return (
            config.keys() == self.choices.keys()
            and all(value in self.choices[knob] for knob, value in config.items())
            and self.validator(config)
        )

    def features(self, config: Config) -> tuple[float, ...]:
        """What a cost model learns from; equal lengths for all configurations of one template name."""
        return self.featurizer(config)

    def make(self, config: Config) -> Kernel:
        """The kernel of a valid configuration, marked with this template."""
        return replace(self.maker(config), template=self)

    def kernel(self) -> Kernel:
        """The kernel of the default configuration: what a builder returns."""
        return self.make(self.default)

    def configs(self) -> Iterator[dict[str, Value]]:
        """All valid configurations, in the order of the choices."""
        for values in itertools.product(*self.choices.values()):
            config = dict(zip(self.choices, values, strict=True))
            if self.validator(config):
                yield config


def template_key(name: str, workload: Mapping[str, Any]) -> str:
    """What `Template.key` is."""
    return hashlib.sha256(f"{name} {canonical(workload)}".encode()).hexdigest()[:32]


def canonical(value: Any) -> str:
    """JSON text that equal workloads or configurations share: sorted keys, no spaces, tuples as lists."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def remake(name: str, workload: Mapping[str, Any]) -> Template:
    """The template of a name and a workload, with constants of the right shape and any values.

    Raises
    ------
    KeyError
        No template has this name.
    """
    module, function = REMAKERS[name].split(":")
    template: Template = getattr(importlib.import_module(module), function)(workload)
    return template


def decode(kind: Any, value: Any) -> Any:
    """A dataclass (with fields of plain values, tuples, dataclasses, or one of these or None) from the JSON values of
    its `asdict`: what a remaker makes of a workload.
    """
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: decode(hints[name], item) for name, item in value.items()})  # type: ignore[operator]
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        if kinds[-1] is Ellipsis:
            return tuple(decode(kinds[0], item) for item in value)
        return tuple(decode(each, item) for each, item in zip(kinds, value, strict=True))
    if get_origin(kind) in (Union, UnionType):
        wanted = next(each for each in get_args(kind) if each is not type(None))
        return None if value is None else decode(wanted, value)
    return value
