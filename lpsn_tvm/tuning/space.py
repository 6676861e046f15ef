"""A template as MetaSchedule sees it: a placeholder function with the kernel's argument buffers, and a space with one
categorical decision per knob.

A candidate is the placeholder with one annotation per knob, the index of the knob's value. It says all that a worker
needs: template name, workload and choices are attributes of the function, so `read_candidate` needs nothing else.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lpsn_tvm.schedules.template import Template, Value, canonical

BLOCK = "candidate"
KNOB = "lpsn.knob."
FAR_JUMP = 0.3
"""Probability that a mutation leaves a knob's neighbouring values."""


@dataclass(frozen=True)
class Candidate:
    """One configuration of one template on one device, as read from a candidate's module."""

    device: str
    template: str
    workload: Mapping[str, Any]
    config: Mapping[str, Value]


def placeholder(template: Template, device: str) -> Any:
    """IRModule with one function `main` of the kernel's buffers (inputs, constants, output), which computes nothing.

    Its structural hash is the identity of a task in the database: device, template, workload and choices are part of
    it.
    """
    import tvm
    from tvm import te, tirx

    kernel = template.kernel()
    buffers = [(spec.memory_shape, spec.dtype) for spec in kernel.inputs]
    buffers += [(array.shape, str(array.dtype)) for array in kernel.constants]
    arguments = [te.placeholder(shape, dtype, name=f"a{i}") for i, (shape, dtype) in enumerate(buffers)]
    out = te.compute(kernel.out.memory_shape, lambda *_: tirx.const(0, kernel.out.dtype), name=BLOCK)
    function = te.create_prim_func([*arguments, out]).with_attrs(
        {
            "global_symbol": "main",
            "lpsn.device": device,
            "lpsn.template": template.name,
            "lpsn.workload": canonical(template.workload),
            "lpsn.choices": json.dumps({knob: list(values) for knob, values in template.choices.items()}),
        }
    )
    return tvm.IRModule({"main": function})


def read_candidate(mod: Any) -> Candidate:
    """What a candidate's module stands for.

    Parameters
    ----------
    mod : IRModule or s_tir.Schedule
        The placeholder with a decision for every knob.
    """
    from tvm import s_tir

    sch = mod if isinstance(mod, s_tir.Schedule) else s_tir.Schedule(mod)
    attrs = sch.mod["main"].attrs
    config = read_config(sch, json.loads(str(attrs["lpsn.choices"])))
    workload = json.loads(str(attrs["lpsn.workload"]))
    return Candidate(str(attrs["lpsn.device"]), str(attrs["lpsn.template"]), workload, config)


def read_config(sch: Any, choices: Mapping[str, Any]) -> dict[str, Value]:
    """The configuration that a schedule of the placeholder was annotated with."""
    annotations = sch.get(sch.get_sblock(BLOCK)).annotations
    return {knob: values[int(annotations[KNOB + knob])] for knob, values in choices.items()}


def annotate(sch: Any, template: Template, config: Mapping[str, Value] | None = None) -> None:
    """Decide every knob: as `config` says, else at random."""
    block = sch.get_sblock(BLOCK)
    for knob, values in template.choices.items():
        count = len(values)
        decision = None if config is None else values.index(config[knob])
        sch.annotate(block, KNOB + knob, sch.sample_categorical(list(range(count)), [1.0 / count] * count, decision))


def space_generator(template: Template, seed: int) -> Any:
    """MetaSchedule's `ScheduleFn` of a template: decisions, a postprocessor that drops what does not fit together, a
    mutator of one knob.
    """
    from tvm.s_tir import meta_schedule as ms

    return ms.space_generator.ScheduleFn(
        lambda sch: annotate(sch, template),
        sch_rules=[],
        postprocs=[_only_valid(template)],
        mutator_probs={_one_knob(seed): 1.0},
    )


def _only_valid(template: Template) -> Any:
    from tvm.ir.utils import derived_object
    from tvm.s_tir import meta_schedule as ms

    @derived_object
    class OnlyValid(ms.postproc.PyPostproc):  # type: ignore[misc]
        """Drops configurations that the template refuses."""

        def _initialize_with_tune_context(self, context: Any) -> None:
            """Nothing of the context is needed."""

        def apply(self, sch: Any) -> bool:
            """Whether the schedule's configuration is valid."""
            return template.is_valid(read_config(sch, template.choices))

        def clone(self) -> Any:
            """Another one: tasks are cloned for threads."""
            return OnlyValid()

    return OnlyValid()


def _one_knob(seed: int) -> Any:
    from tvm.ir.utils import derived_object
    from tvm.s_tir import meta_schedule as ms

    @derived_object
    class OneKnob(ms.mutator.PyMutator):  # type: ignore[misc]
        """Changes one knob of a trace, mostly to a neighbouring value."""

        def _initialize_with_tune_context(self, context: Any) -> None:
            self.generator = random.Random(seed)

        def apply(self, trace: Any, seed: Any) -> Any:
            """A trace that differs in one decision; None where no knob has two values."""
            decisions = [i for i in trace.insts if i.kind.name == "SampleCategorical" and len(i.attrs[0]) > 1]
            if not decisions:
                return None
            decision = self.generator.choice(decisions)
            count, now = len(decision.attrs[0]), int(trace.decisions[decision])
            near = [i for i in (now - 1, now + 1) if 0 <= i < count]
            far = [i for i in range(count) if i != now]
            new = self.generator.choice(far if self.generator.random() < FAR_JUMP else near)
            # A plain integer: the instruction does not accept an IntImm when the trace is replayed.
            return trace.with_decision(decision, new, True)

        def clone(self) -> Any:
            """Another one: tasks are cloned for threads."""
            return OneKnob()

    return OneKnob()
