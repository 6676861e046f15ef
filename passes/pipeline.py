"""The ordered list of what happens to a network between import and a target's lowering."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lpsn_tvm.frontend.importer import ImportedModel
from lpsn_tvm.graph import find_layers
from lpsn_tvm.passes.canonicalize import canonicalize
from lpsn_tvm.passes.equalize import apply_factors, choose_factors
from lpsn_tvm.passes.fuse_float import fuse_float
from lpsn_tvm.passes.lower_to_integer import lower_to_integer
from lpsn_tvm.passes.plan_quantization import plan_quantization
from lpsn_tvm.passes.prune import prune
from lpsn_tvm.passes.prune_result import PruneResult
from lpsn_tvm.passes.regions import Regions, find_regions
from lpsn_tvm.passes.removal_counts import check_names
from lpsn_tvm.passes.remove_dead_channels import remove_dead_channels
from lpsn_tvm.progress import ProgressCallback, silent
from lpsn_tvm.quant import QuantParams, QuantPlan, QuantScheme
from lpsn_tvm.recipe import Recipe

EQUALIZE_BATCH = 16


@dataclass
class Network:
    """What the stages hand on.

    Parameters
    ----------
    imported : ImportedModel
        What the frontend read.
    recipe : Recipe
    scheme : QuantScheme
        Of the backend.
    align : int
        Kept channels are a multiple of this.
    calibration : CalibrationSet
    kept_scales : mapping of name to QuantParams
        Scales of a model that came with QuantizeLinear nodes.
    mod : IRModule
        The network as it is now.
    dense, pruned : IRModule
        Canonical float network before and after channel removal.
    plan, regions, pruning
        What the stages decided; None where a stage is not in the list.
    """

    imported: ImportedModel
    recipe: Recipe
    scheme: QuantScheme
    align: int
    calibration: Any
    kept_scales: Mapping[str, QuantParams] = field(default_factory=dict)
    mod: Any = None
    dense: Any = None
    pruned: Any = None
    plan: QuantPlan | None = None
    regions: Regions | None = None
    pruning: PruneResult | None = None
    progress: ProgressCallback = silent


class Stage(NamedTuple):
    """A name for progress and report, and the function."""

    name: str
    run: Callable[[Network], None]


def stages(recipe: Recipe, *, is_synthetic: bool) -> list[Stage]:
    """The stages of this recipe, in order; one that does not apply is not in the list.

    Without real calibration data only provably dead channels are removed.
    """
    wants_removal = recipe.sparsity is not None
    return [
        Stage("canonicalize", _canonicalize),
        *([Stage("remove dead channels", _remove_dead)] if wants_removal and is_synthetic else []),
        *([Stage("prune", _prune)] if wants_removal and not is_synthetic else []),
        *([Stage("quantize", _quantize), Stage("lower to integer", _lower)] if recipe.bits else []),
        Stage("fuse float", _fuse),
    ]


def _canonicalize(net: Network) -> None:
    renamed: dict[str, str] = {}
    net.mod = net.dense = net.pruned = canonicalize(net.imported.mod, renamed=renamed)
    layers, sparsity = list(find_layers(net.mod)), net.recipe.sparsity
    check_names(net.recipe.ignore, layers, "ignore")
    check_names(sparsity if isinstance(sparsity, Mapping) else (), layers, "sparsity")
    if net.recipe.keep_scales:
        net.kept_scales = net.imported.canonical_qdq(net.mod, renamed)


def _remove_dead(net: Network) -> None:
    net.mod = net.pruned = remove_dead_channels(net.mod)


def _prune(net: Network) -> None:
    recipe = net.recipe
    assert recipe.sparsity is not None
    net.pruning = prune(
        net.mod,
        net.calibration,
        sparsity=recipe.sparsity,
        align=net.align,
        score=recipe.score,
        order=recipe.order,
        allocation=recipe.allocation,
        ignore=recipe.ignore,
        seed=recipe.seed,
        memory_budget=recipe.memory_budget,
        bits=recipe.bits,
        progress=net.progress,
    )
    net.mod = net.pruned = net.pruning.mod


def _quantize(net: Network) -> None:
    recipe = net.recipe
    assert recipe.bits is not None
    net.regions = find_regions(net.mod, recipe.ignore)
    if net.scheme.rounding == "half_up" and not net.kept_scales and not net.calibration.synthetic:
        # Weight scales on a grid of powers of two and one activation scale per tensor suffer most from uneven channels.
        factors = choose_factors(net.mod, net.regions, net.calibration.batches(EQUALIZE_BATCH), recipe.bits[1])
        net.mod = net.pruned = apply_factors(net.mod, factors)
    net.plan = plan_quantization(
        net.mod,
        net.calibration,
        weight_bits=recipe.bits[0],
        activation_bits=recipe.bits[1],
        scheme=net.scheme,
        observer=recipe.observer,
        rounding=recipe.rounding,
        keep=net.kept_scales,
        keep_weights=net.imported.canonical_qdq_weights(net.mod) if recipe.keep_scales else {},
        ignore=recipe.ignore,
        seed=recipe.seed,
        memory_budget=recipe.memory_budget,
        regions=net.regions,
        progress=net.progress,
    )


def _lower(net: Network) -> None:
    assert net.plan is not None
    net.mod = lower_to_integer(net.mod, net.plan, net.regions, net.scheme)


def _fuse(net: Network) -> None:
    net.mod = fuse_float(net.mod)
