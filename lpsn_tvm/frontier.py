"""All kept samples at one cut through the network: what greedy, layer-by-layer algorithms walk on.

    frontier = Frontier(interpreter, calibration.take(256, seed=0), memory_budget=2**30)
    for layer in layers:                       # in execution order
        frontier.advance(layer.data)           # every layer before this one is final now
        for x in frontier.batches(layer.data):
            ...                                # gather statistics of the layer's input
        interpreter.set_params(layer.name, weight, bias)

Only the values that later steps still read are held; nothing in between survives its batch. A step runs once, with the
parameters of that moment: changing a layer after the cut has passed it changes nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from lpsn_tvm.errors import CalibrationError, ModelError
from lpsn_tvm.interpreter import TorchInterpreter, Transform

Tensor = torch.Tensor
Progress = Callable[[int, int], None]
HALF_LIMIT = 60000.0
"""Tensors that reach this magnitude stay float32 when the frontier holds float16 (largest: 65504)."""


class Frontier:
    """Values of all samples at the current cut, advanced step by step.

    Parameters
    ----------
    interpreter : TorchInterpreter
        May be replaced later (`rebase`), and its `params` may change at any time.
    batches : iterable of dict of str to ndarray
        The network's inputs, batch by batch (a `CalibrationSet`). Read once.
    memory_budget : int, optional
        Bytes that the held values may take. Checked while the inputs are read and at every `advance`.
    dtype : torch.dtype
        float32, or float16 to hold twice as many samples (computation stays float32).
    transform : callable (name, tensor) -> tensor, optional
        Applied to every input and every value as it is produced: a fake-quantized prefix. The attribute may be replaced
        at any time.

    Raises
    ------
    CalibrationError
        No batches, or more than the budget holds; says how many samples fit.
    """

    def __init__(
        self,
        interpreter: TorchInterpreter,
        batches: Iterable[Mapping[str, Any]],
        memory_budget: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        transform: Transform | None = None,
    ) -> None:
        self.interpreter = interpreter
        self.memory_budget = memory_budget
        self.dtype = dtype
        self.transform = transform
        self._done: set[str] = set(interpreter.inputs)
        self._values: list[dict[str, Tensor]] = []
        self.samples = 0
        for feeds in batches:
            # `run` without steps: converts and transforms the inputs.
            values = interpreter.run(feeds, fetch=interpreter.inputs, transform=transform)
            self._values.append({name: self._held(value) for name, value in values.items()})
            self.samples += next(iter(values.values())).shape[0]
            self._check_budget()
        if not self._values:
            raise CalibrationError("no calibration samples to evaluate the network on")

    # --- size ---------------------------------------------------------------------------------------------------------

    @staticmethod
    def max_samples(
        interpreter: TorchInterpreter,
        budget_bytes: int,
        *,
        stops: Iterable[str] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """How many samples fit into a budget, for the largest cut on the way.

        Parameters
        ----------
        interpreter : TorchInterpreter
            Not run; traced shapes are counted.
        budget_bytes : int
            For the held values of one frontier; the working memory of one batch comes on top.
        stops : iterable of str, optional
            The variables that will be advanced to, in this order; all inputs of layers and the outputs by default.
        dtype : torch.dtype
            What the frontier holds.

        Returns
        -------
        int
            0 when not even one sample fits.
        """
        if stops is None:
            stops = layer_inputs(interpreter)
        done = set(interpreter.inputs)
        held = set(interpreter.inputs)
        peak = _bytes_per_sample(interpreter, held, dtype)
        for name in stops:
            done |= {step.name for step in interpreter.needed((name,), held)}
            held = _alive(interpreter, done, {name} | set(interpreter.outputs))
            peak = max(peak, _bytes_per_sample(interpreter, held, dtype))
        return int(budget_bytes // peak)

    @property
    def nbytes(self) -> int:
        """Bytes of the held values; values shared with a fork count in both."""
        return sum(value.nbytes for values in self._values for value in values.values())

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the values at the cut."""
        return tuple(self._values[0])

    def _held(self, value: Tensor) -> Tensor:
        if self.dtype == torch.float32 or value.dtype != torch.float32:
            return value
        if value.numel() and float(value.detach().abs().amax()) >= HALF_LIMIT:
            return value
        return value.to(self.dtype)

    def _check_budget(self) -> None:
        if self.memory_budget is not None and self.nbytes > self.memory_budget:
            fits = self.samples * self.memory_budget // max(self.nbytes, 1)
            raise CalibrationError(
                f"{self.samples} samples take {self.nbytes >> 20} MiB at this cut, the budget is "
                f"{self.memory_budget >> 20} MiB; about {fits} samples fit (see Frontier.max_samples)"
            )

    # --- walking ------------------------------------------------------------------------------------------------------

    def advance(self, name: str, progress: Progress | None = None) -> None:
        """Computes, batch by batch, what is needed until variable `name` exists; drops what no later step reads.

        Steps that `name` does not depend on are not run. Does nothing if `name` is held.

        Parameters
        ----------
        name : str
            A variable that is held, or not computed yet.
        progress : callable, optional
            Called with (batches done, batches).

        Raises
        ------
        ModelError
            The cut has passed `name` and its value is gone, or there is no such variable.
        """
        if name in self._values[0]:
            return
        steps = self._path(name)
        self._done |= {step.name for step in steps}
        keep = _alive(self.interpreter, self._done, {name} | set(self.interpreter.outputs))
        fresh = {step.name for step in steps} & keep
        for index, values in enumerate(self._values):
            computed = self._compute(values, fresh)
            merged = {key: value for key, value in values.items() if key in keep}
            merged.update((key, self._held(value)) for key, value in computed.items())
            self._values[index] = merged
            if progress is not None:
                progress(index + 1, len(self._values))
        self._check_budget()

    def batches(self, name: str) -> Iterator[Tensor]:
        """Yields `name` as float32, batch by batch, in the order of the samples.

        A variable that is not computed yet is computed on the fly from the cut and not kept; the cut stays where it is.
        """
        if name not in self._values[0]:
            self._path(name)
        for values in self._values:
            if name in values:
                yield values[name].to(torch.float32)
            else:
                yield self._compute(values, {name})[name]

    def _path(self, name: str) -> list[Any]:
        held = self._values[0]
        # Follow what is missing: a value that was computed and is not held any more cannot be made again.
        steps = self.interpreter.needed((name,), self._done | set(held)) if name not in self._done else []
        gone = [key for step in steps for key in step.variables if key in self._done and key not in held]
        if gone or name in self._done:
            raise ModelError(
                f"the cut has passed this variable: {(gone or [name])[0]} is not held any more", where=name
            )
        return steps

    def _compute(self, values: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        # Inputs at the cut have seen the transform already, `run` would apply it to them again.
        inputs, transform = set(self.interpreter.inputs), self.transform

        def once(name: str, tensor: Tensor) -> Tensor:
            return tensor if transform is None or name in inputs else transform(name, tensor)

        return self.interpreter.run(values, fetch=names, transform=None if transform is None else once)

    # --- surgery ------------------------------------------------------------------------------------------------------

    def fork(self, interpreter: TorchInterpreter | None = None) -> Frontier:
        """A second frontier at the same cut; tensors are shared (none is ever changed in place), so this is cheap."""
        other = Frontier.__new__(Frontier)
        other.interpreter = self.interpreter if interpreter is None else interpreter
        other.memory_budget, other.dtype, other.transform = self.memory_budget, self.dtype, self.transform
        other.samples, other._done = self.samples, set(self._done)
        other._values = [dict(values) for values in self._values]
        return other

    def rebase(self, interpreter: TorchInterpreter) -> None:
        """Goes on with a rebuilt graph of the same variable names; values that it does not know are dropped.

        Held values keep their shapes: where channels were removed from one, call `keep_channels` for it.
        """
        self.interpreter = interpreter
        self._done &= set(interpreter.shapes)
        keep = _alive(interpreter, self._done, set(interpreter.outputs) | set(self.held))
        self._values = [{k: v for k, v in values.items() if k in keep} for values in self._values]

    def map_value(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        """Replaces a held value by `function(value)`, batch by batch (float32 in)."""
        self._require(name)
        for values in self._values:
            values[name] = self._held(function(values[name].to(torch.float32)))

    def keep_channels(self, name: str, index: Any) -> None:
        """Keeps only these channels (axis 1, int64[kept]) of a held value."""
        self._require(name)
        for values in self._values:
            value = values[name]
            values[name] = value.index_select(1, torch.as_tensor(index, dtype=torch.int64, device=value.device))

    def drop(self, name: str) -> None:
        """Forgets a held value (what depends on it can no longer be computed)."""
        self._require(name)
        for values in self._values:
            del values[name]

    def _require(self, name: str) -> None:
        if name not in self._values[0]:
            raise ModelError(f"is not held at this cut; held are {', '.join(self.held)}", where=name)


def layer_inputs(interpreter: TorchInterpreter) -> list[str]:
    """The variables that layers read, in execution order, then the outputs: where layer-by-layer algorithms stop."""
    names = [step.inputs[0] for step in interpreter.steps if step.name in interpreter.accumulators]
    return list(dict.fromkeys(names + list(interpreter.outputs)))


def _alive(interpreter: TorchInterpreter, done: set[str], always: set[str]) -> set[str]:
    """Computed variables that a step still to come reads, and those of `always` that are computed."""
    waiting = {name for step in interpreter.useful if step.name not in done for name in step.variables}
    return (waiting | always) & done


def _bytes_per_sample(interpreter: TorchInterpreter, names: Iterable[str], dtype: torch.dtype) -> int:
    width = torch.finfo(dtype).bits // 8
    total = 0
    for name in names:
        shape = interpreter.shapes[name]
        total += width * int(torch.Size(shape).numel()) // max(1, shape[0] if shape else 1)
    return max(total, 1)
