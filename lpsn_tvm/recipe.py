"""What the user chose: one frozen, validated record that is saved with every module."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from lpsn_tvm.budget import Budget
from lpsn_tvm.errors import RecipeError

Score = Literal["output_error", "mean_activation", "zero_fraction", "random"]
Order = Literal["greedy", "one_shot"]
Allocation = Literal["uniform", "nonuniform"]
ObserverKind = Literal["mse", "minmax", "percentile", "entropy"]
Rounding = Literal["auto", "gptq", "nearest"]

MIN_BITS, MAX_BITS = 2, 8
DEFAULT_SAMPLES = 512
GIB = 1 << 30


@dataclass(frozen=True)
class Recipe:
    """Every option of a build, validated once.

    Parameters
    ----------
    target : str
        Name of the backend or its target string, for the record.
    bits : (int, int) or None
        Weight bits and activation bits, each 2..8; None keeps the network in float.
    sparsity : float, mapping of layer name (or pattern) to float, "auto" or None
        Fraction of channels to remove per layer, in [0, 1). "auto" removes as long as the added output error stays
        below the error that the bit width adds anyway. None removes nothing.
    align : int or None
        Kept channel counts are a multiple of this; None: the backend's tile where the layer is wide enough; 1: exact
        fractions.
    score : {"output_error", "mean_activation", "zero_fraction", "random"}
        How channels are ranked; "mean_activation" is the paper's importance (Zhang, Colbert, Das 2022, Section 3).
    order : {"greedy", "one_shot"}
        Greedy estimates each layer on the already sparsified prefix; one-shot estimates all on the dense network.
    allocation : {"uniform", "nonuniform"}
        Uniform: the same fraction in every layer. Nonuniform: the same total MACs, spent where the output error is
        least.
    observer : {"mse", "minmax", "percentile", "entropy"}
        How activation ranges are chosen.
    rounding : {"auto", "gptq", "nearest"}
        How weights are rounded; "auto" is nearest at 8 bits and GPTQ below.
    ignore : tuple of str
        Layer names or shell patterns that are neither pruned nor quantized.
    batch : int
        Batch size that the module is compiled for.
    input_shapes : mapping of input name to shape
        Fixes dynamic dimensions.
    samples : int
        At most this many calibration samples are used.
    keep_scales : bool
        Keep the scales of a model that already has QuantizeLinear / DequantizeLinear nodes.
    seed : int
        Seed of every random choice.
    num_threads : int or None
        Threads the module runs with; None: all cores of the machine it runs on.
    memory_budget : int
        Bytes that calibration may hold in cached activations.
    measure : bool
        Measure for the report: llvm compiles the float network, too, and times both; vta simulates the programs.
    search : bool or float
        vta: search schedules (True), at most this many seconds per layer, or take the default ones (False).
    cache : bool or str
        Keep what was found in the user's cache directory (True), in this directory, or not at all (False): schedules
        of vta, trials of tuning.
    tune : int, str or None
        llvm and cuda: measure configurations of the network's kernels on this machine for so many trials (200) or so
        long ("90s", "10m", "1h"), and use those that beat the default ones. What an earlier, killed run has kept in
        `cache` counts.
    tracker : str or None
        "HOST:PORT" or "HOST:PORT/KEY" of `lpsn-tvm rpc-tracker`: tune on the machines that it knows.
    """

    target: str = "llvm"
    bits: tuple[int, int] | None = (8, 8)
    sparsity: float | Mapping[str, float] | Literal["auto"] | None = None
    align: int | None = None
    score: Score = "output_error"
    order: Order = "greedy"
    allocation: Allocation = "uniform"
    observer: ObserverKind = "mse"
    rounding: Rounding = "auto"
    ignore: tuple[str, ...] = ()
    batch: int = 1
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    samples: int = DEFAULT_SAMPLES
    keep_scales: bool = True
    seed: int = 0
    num_threads: int | None = None
    memory_budget: int = 3 * GIB // 8
    measure: bool = True
    search: bool | float = True
    cache: bool | str = True
    tune: int | str | None = None
    tracker: str | None = None

    @classmethod
    def from_options(cls, **options: Any) -> Recipe:
        """Validate user options; raise RecipeError that names the option and what is allowed."""
        known = {f for f in cls.__dataclass_fields__}
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise RecipeError(f"unknown option{hint}; allowed: {', '.join(sorted(known))}", where=name)
        if "bits" in options:
            options["bits"] = _parse_bits(options["bits"])
        if "sparsity" in options:
            options["sparsity"] = _parse_sparsity(options["sparsity"])
        if "ignore" in options:
            options["ignore"] = _parse_ignore(options["ignore"])
        if "input_shapes" in options:
            options["input_shapes"] = _parse_shapes(options["input_shapes"] or {})
        for name, low, optional in (
            ("align", 1, True),
            ("batch", 1, False),
            ("samples", 1, False),
            ("seed", 0, False),
            ("num_threads", 1, True),
            ("memory_budget", 1 << 20, False),
        ):
            if name in options:
                options[name] = _parse_int(name, options[name], low, optional)
        if "search" in options:
            options["search"] = _parse_search(options["search"])
        if "cache" in options:
            options["cache"] = _parse_cache(options["cache"])
        if options.get("tune") is not None:
            Budget.parse(options["tune"])
        if not isinstance(options.get("tracker"), (str, type(None))):
            raise RecipeError(f'must be "HOST:PORT/KEY", got {options["tracker"]!r}', where="tracker")
        for name in ("keep_scales", "measure"):
            if not isinstance(options.get(name, True), bool):
                raise RecipeError(f"must be True or False, got {options[name]!r}", where=name)
        for name, choices in (
            ("score", Score),
            ("order", Order),
            ("allocation", Allocation),
            ("observer", ObserverKind),
            ("rounding", Rounding),
        ):
            if name in options and options[name] not in get_args(choices):
                raise RecipeError(
                    f"{options[name]!r} is not one of {', '.join(map(repr, get_args(choices)))}", where=name
                )
        return cls(**options)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        record = asdict(self)
        record["bits"] = list(self.bits) if self.bits else None
        record["ignore"] = list(self.ignore)
        record["input_shapes"] = {name: list(shape) for name, shape in self.input_shapes.items()}
        if isinstance(self.sparsity, Mapping):
            record["sparsity"] = dict(self.sparsity)
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_json`; unknown keys of a newer minor version are ignored."""
        known = {key: value for key, value in record.items() if key in cls.__dataclass_fields__}
        return cls.from_options(**known)


def _parse_int(name: str, value: Any, low: int, optional: bool) -> int | None:
    if value is None and optional:
        return None
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < low:
        raise RecipeError(f"must be an integer of at least {low}, got {value!r}", where=name)
    return int(value)


def _parse_search(value: Any) -> bool | float:
    if isinstance(value, bool):
        return value
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise RecipeError(f"must be True, False or seconds per layer, got {value!r}", where="search")
    return float(value)


def _parse_cache(value: Any) -> bool | str:
    if isinstance(value, bool):
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise RecipeError(f"must be True, False or a directory, got {value!r}", where="cache")
    return os.fspath(value)


def _parse_bits(value: Any) -> tuple[int, int] | None:
    if value is None or (isinstance(value, int) and value == 32):
        return None
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    is_valid = len(pair) == 2 and all(
        hasattr(b, "__index__") and not isinstance(b, bool) and MIN_BITS <= int(b) <= MAX_BITS for b in pair
    )
    if not is_valid:
        raise RecipeError(
            f"must be {MIN_BITS}..{MAX_BITS}, a pair (weight bits, activation bits), or None for float; got {value!r}",
            where="bits",
        )
    return int(pair[0]), int(pair[1])


def _fraction(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not 0.0 <= number < 1.0:
        raise RecipeError(f"must be a fraction of channels in [0, 1), got {value!r}", where=where)
    return number


def _parse_sparsity(value: Any) -> float | dict[str, float] | Literal["auto"] | None:
    if value is None:
        return None
    if isinstance(value, str):
        if value == "auto":
            return "auto"
        raise RecipeError(
            f'must be a fraction in [0, 1), a mapping from layer names to fractions, "auto" or None; got {value!r}',
            where="sparsity",
        )
    if isinstance(value, Mapping):
        return {str(layer): _fraction(fraction, f"sparsity[{layer!r}]") for layer, fraction in value.items()}
    return _fraction(value, "sparsity")


def _parse_ignore(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, Sequence) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise RecipeError(f"must be a list of layer names or patterns, got {value!r}", where="ignore")


def _parse_shapes(value: Any) -> dict[str, tuple[int, ...]]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"must map input names to shapes, got {value!r}", where="input_shapes")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in value.items():
        try:
            extents = tuple(int(extent) for extent in shape)
        except (TypeError, ValueError):
            extents = ()
        if not extents or any(extent < 1 for extent in extents):
            raise RecipeError(
                f"must be a sequence of positive integers, got {shape!r}", where=f"input_shapes[{name!r}]"
            )
        shapes[str(name)] = extents
    return shapes
