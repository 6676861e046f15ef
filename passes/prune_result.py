"""What `prune` hands back: the network, and what happened to every channel group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tvm

from lpsn_tvm.graph import Layer


@dataclass(frozen=True)
class GroupRecord:
    """What happened to one channel group.

    Parameters
    ----------
    name : str
        The group's (first producer's) name.
    layers : tuple of str
        All layers whose output channels it is.
    before, after : int
        Channels of the first producer.
    predicted_error : float
        Output error that removal adds at the consumers, over the variance of their outputs, as elimination predicts
        it; 0 for other scores.
    measured_error : float
        Output error at the first consumer after the re-solve, everything removed before included.
    reason : str
        Why the group was left whole; empty if it was not.
    scores : float64[size] or None
        Importance of every unit, the smallest goes first.
    """

    name: str
    layers: tuple[str, ...]
    before: int
    after: int
    predicted_error: float = 0.0
    measured_error: float = 0.0
    reason: str = ""
    scores: np.ndarray | None = None


@dataclass(frozen=True)
class PruneResult:
    """Result of `prune`.

    Parameters
    ----------
    mod : IRModule
        Canonical, channels removed, weights re-solved.
    layers : tuple of GroupRecord
        Every group, in execution order; left-whole ones last.
    masks : dict of group name to bool[size]
        True is kept.
    frozen : dict of group name to str
        Groups that were left whole, and why.
    layer_errors : dict of layer name to float
        Pre-activation output error of every re-solved layer, over the variance of the dense network's output.
    samples : int
        Calibration samples that were used.
    notes : tuple of str
        What the user should know, for the report.
    """

    mod: tvm.IRModule
    layers: tuple[GroupRecord, ...]
    masks: dict[str, np.ndarray]
    frozen: dict[str, str]
    layer_errors: dict[str, float]
    samples: int
    notes: tuple[str, ...] = ()


def whole_records(whole: Sequence[tuple[str, str]], layers: Mapping[str, Layer]) -> list[GroupRecord]:
    """Records of the groups (name, reason) that were left whole."""
    records = []
    for name, reason in whole:
        layer = layers.get(name.split("#")[0])
        channels = layer.out_channels if layer is not None else 0
        records.append(GroupRecord(name, (name,), channels, channels, reason=reason))
    return records
