"""What the dense network computes, read once, batch by batch in constant memory: the targets of every re-solve and
the statistics of far consumers.

For every layer the pre-activation outputs at sampled positions are kept (float32), so the dense network is never run
again and only the
compressed one is held on a frontier. For the layers in `gram_layers` X^T X of the dense inputs is kept too: consumers
of a residual stream that lie further down are scored on it when the stream's mask is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpsn_tvm.graph import Layer
from lpsn_tvm.interpreter import TorchInterpreter
from lpsn_tvm.passes.normal_equations import LayerGeometry, NormalEquations
from lpsn_tvm.passes.scores import ChannelMean

MAX_ROWS = 12288
GRAM_WORK = 2e10
"""Multiply-adds that X^T X of one layer may take before rows are saved."""
ROWS_PER_COLUMN = 2.5
BATCH_BYTES = 1 << 26


@dataclass
class LayerReference:
    """One layer of the dense network.

    Parameters
    ----------
    geometry : LayerGeometry
    per_sample : int
        Output positions that are sampled of every sample.
    targets : list of float32[rows, O]
        Pre-activation outputs, one tensor per batch; of the residual sum if the layer closes one.
    gram : float32[groups, k + 1, k + 1] or None
        X^T X of the dense inputs.
    rows : int
        Rows of all batches together.
    quantization_error : float
        Sum of squared output errors that fake-quantized weights and inputs cause; 0 unless asked for.
    activity : ChannelMean or None
        The paper's importance of the layer's input channels, on the dense network.
    """

    geometry: LayerGeometry
    per_sample: int
    targets: list[Tensor] = field(default_factory=list)
    gram: Tensor | None = None
    rows: int = 0
    quantization_error: float = 0.0
    activity: ChannelMean | None = None
    _moments: Tensor | None = None

    def add_targets(self, y: Tensor) -> None:
        """One more batch of outputs y[rows, O]."""
        self.targets.append(y.float().clone())
        self.rows += len(y)
        double = y.double()
        sums = torch.stack([double.sum(dim=0), double.square().sum(dim=0)])
        self._moments = sums if self._moments is None else self._moments + sums

    @property
    def energy(self) -> Tensor:
        """float64[O]: sum of squares of the targets."""
        assert self._moments is not None
        return self._moments[1]

    @property
    def spread(self) -> Tensor:
        """float64[O]: sum of squares of the targets minus their mean."""
        assert self._moments is not None
        return (self._moments[1] - self._moments[0].square() / self.rows).clamp_min(0)


@dataclass(frozen=True)
class ReferenceOptions:
    """What to collect.

    Parameters
    ----------
    seed : int
        Of the sampled positions.
    memory_budget : int
        Bytes for the targets.
    gram_layers : frozenset of str
        Layers whose X^T X is kept.
    score : str
        Activation statistic to keep of the inputs of `gram_layers`, or any other word.
    bits : (int, int) or None
        Also measure the quantization error of every layer at (weight bits, activation bits).
    """

    seed: int
    memory_budget: int
    gram_layers: frozenset[str] = frozenset()
    score: str = ""
    bits: tuple[int, int] | None = None


def batch_size(interpreter: TorchInterpreter, limit: int = 32) -> int:
    """Samples per batch so that the largest tensor of a batch stays within 64 MiB."""
    largest = max(torch.Size(shape[1:]).numel() for shape in interpreter.shapes.values() if shape)
    return max(1, min(limit, BATCH_BYTES // (4 * largest)))


def rows_wanted(layers: Mapping[str, LayerGeometry], samples: int, memory_budget: int) -> dict[str, int]:
    """Output positions per sample for every layer: as many as time and memory allow, at least a few times the columns.

    Parameters
    ----------
    layers : mapping of name to LayerGeometry
        All weighted layers.
    samples : int
        Calibration samples.
    memory_budget : int
        Bytes for the targets of all layers.
    """
    least, wanted = {}, {}
    for name, g in layers.items():
        least[name] = min(g.positions * samples, int(ROWS_PER_COLUMN * (g.columns + 1)) + 512)
        affordable = int(min(MAX_ROWS, GRAM_WORK / (g.columns + 1) ** 2))
        wanted[name] = min(g.positions * samples, max(affordable, least[name]))
    size = sum(4 * wanted[name] * g.out_channels for name, g in layers.items())
    factor = min(1.0, memory_budget / max(1, size))
    return {
        name: min(g.positions, -(-max(least[name], int(wanted[name] * factor)) // samples))
        for name, g in layers.items()
    }


class Sum(NamedTuple):
    """A residual sum: its variable, and the addend that is known before the layer that closes it."""

    name: str
    other: str


def closing_sums(interpreter: TorchInterpreter, layers: Mapping[str, Layer]) -> dict[str, Sum]:
    """Layers whose output is only added to an earlier value: their target is the whole sum.

    What the compressed network got wrong in the earlier addend is then made up for by this layer, instead of piling
    up along the stream.
    """
    order = {name: -1 for name in interpreter.inputs} | {step.name: n for n, step in enumerate(interpreter.steps)}
    sums: dict[str, Sum] = {}
    for name, layer in layers.items():
        users = interpreter.consumers(name)
        if len(users) != 1 or name in interpreter.outputs:
            continue
        step = interpreter.by_name[users[0]]
        others = [operand for operand in step.variables if operand != name]
        if step.op != "relax.add" or step.layer is not None or len(others) != 1:
            continue
        is_earlier = order[others[0]] < order[layer.acc]
        if is_earlier and interpreter.shapes[others[0]] == interpreter.shapes[name]:
            sums[name] = Sum(step.name, others[0])
    return sums


def read_dense_network(
    interpreter: TorchInterpreter,
    layers: Mapping[str, Layer],
    batches: Iterable[Mapping[str, Any]],
    samples: int,
    options: ReferenceOptions,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, LayerReference]:
    """Run the dense network once over all batches.

    Parameters
    ----------
    interpreter : TorchInterpreter
        With the dense weights.
    layers : mapping of name to Layer
        All weighted layers.
    batches : iterable of dict of str to ndarray
        The network's inputs.
    samples : int
        How many there are in `batches`.
    options : ReferenceOptions
        What to collect.
    progress : callable (samples done)
        Called after every batch.
    """
    geometries = {name: LayerGeometry.of(layer) for name, layer in layers.items()}
    per_sample = rows_wanted(geometries, samples, options.memory_budget)
    references = {name: LayerReference(geometries[name], per_sample[name]) for name in layers}
    grams = {
        name: NormalEquations(g.groups, g.columns + 1, 0)
        for name, g in geometries.items()
        if name in options.gram_layers
    }
    readers: dict[str, list[str]] = {}
    for name, layer in layers.items():
        readers.setdefault(layer.data, []).append(name)
    sums = closing_sums(interpreter, layers)
    written = {sums[name].name if name in sums else name: name for name in layers}
    done = 0
    for number, feeds in enumerate(batches):

        def see(variable: str, value: Tensor, number: int = number) -> Tensor:
            for name in readers.get(variable, ()):
                if name in grams or options.bits is not None:
                    _read_input(name, value, number, interpreter, references[name], grams.get(name), options)
            if variable in written:
                name = written[variable]
                reference = references[name]
                where = reference.geometry.sample_positions(reference.per_sample, options.seed, name, number)
                reference.add_targets(reference.geometry.targets(value, where))
            return value

        interpreter.run(feeds, transform=see)
        done += len(next(iter(feeds.values())))
        progress(done)
    for name, equations in grams.items():
        references[name].gram = equations.gram.float()
    return references


def _read_input(
    name: str,
    x: Tensor,
    number: int,
    interpreter: TorchInterpreter,
    reference: LayerReference,
    equations: NormalEquations | None,
    options: ReferenceOptions,
) -> None:
    """Statistics of one batch of a layer's input."""
    geometry = reference.geometry
    where = geometry.sample_positions(reference.per_sample, options.seed, name, number)
    rows = geometry.rows(x, where)
    if equations is not None:
        equations.add(rows)
        if options.score in ("mean_activation", "zero_fraction"):
            reference.activity = reference.activity or ChannelMean(options.score)
            reference.activity.add(x)
    if options.bits is not None:
        weight, bias = interpreter.params[name]
        matrix = geometry.weight_matrix(weight, bias).float()
        reference.quantization_error += quantization_error(rows, matrix, *options.bits)


def quantization_error(rows: Tensor, matrix: Tensor, weight_bits: int, activation_bits: int) -> float:
    """Squared output error of plain quantization at these widths (symmetric per output weights, asymmetric per tensor
    inputs).

    Parameters
    ----------
    rows : float32[groups, n, k + 1]
        Row matrix, bias column last.
    matrix : float32[groups, k + 1, O/groups]
        Weights and, in the last row, biases.
    weight_bits, activation_bits : int
        2..8.
    """
    body, weights = rows[:, :, :-1], matrix[:, :-1]
    low, high = body.min().clamp_max(0), body.max().clamp_min(0)
    step = ((high - low) / (2**activation_bits - 1)).clamp_min(1e-12)
    zero = torch.round(-low / step)
    inputs = (torch.round(body / step) + zero).clamp(0, 2**activation_bits - 1).sub(zero).mul(step)
    top = 2 ** (weight_bits - 1) - 1
    scale = (weights.abs().amax(dim=1, keepdim=True) / top).clamp_min(1e-12)
    best = None
    for clip in (1.0, 0.9, 0.8, 0.7, 0.6):
        rounded = torch.round(weights / (scale * clip)).clamp(-top - 1, top) * scale * clip
        error = (rounded - weights).square().sum(dim=1, keepdim=True)
        best = (
            (rounded, error)
            if best is None
            else (torch.where(error < best[1], rounded, best[0]), torch.minimum(error, best[1]))
        )
    assert best is not None
    return float((torch.bmm(inputs, best[0]) - torch.bmm(body, weights)).double().square().sum())
