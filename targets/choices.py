"""What lowering decided wherever a kernel offers a choice: for the report, and for the tuner, which learns from it what
there is to tune.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lpsn_tvm.records import Record, Records
from lpsn_tvm.schedules.kernel import Kernel
from lpsn_tvm.schedules.template import Template


@dataclass(frozen=True)
class Choice:
    """One call of a kernel with a template.

    Parameters
    ----------
    device : str
    node : str
        The variable it computes.
    template : Template
        With the layer's own constants.
    record : Record or None
        What the kernel was made from; None: the default configuration.
    note : str
        Why a record was not used; "" where there was none to use.
    """

    device: str
    node: str
    template: Template
    record: Record | None
    note: str


class Choices(list[Choice]):
    """A log of choices, given to `Backend.on_choice`."""

    def __call__(self, choice: Choice) -> None:
        """Write one down."""
        self.append(choice)

    def summary(self, records: Records) -> dict[str, Any]:
        """What the report says: devices, digest of the records, calls with a choice, and layer by layer what was used;
        empty where no kernel offers a choice.
        """
        if not self:
            return {}
        used = {choice.node: choice for choice in self if choice.record is not None}
        return {
            "devices": sorted({choice.device for choice in self}),
            "digest": records.digest,
            "choices": len(self),
            "layers": {
                node: {"template": choice.template.name, "config": dict(choice.record.config)}
                for node, choice in used.items()
                if choice.record is not None
            },
            "notes": sorted({choice.note for choice in self if choice.note}),
        }


def nobody(choice: Choice) -> None:
    """Nobody listens."""


def chosen(backend: Any, kernel: Kernel, node: str) -> Kernel:
    """The kernel in the configuration that the backend's records name, where they do."""
    template = kernel.template
    if template is None:
        return kernel
    record = backend.records.find(backend.device, template)
    backend.on_choice(Choice(backend.device, node, template, record, backend.records.misfit(backend.device, template)))
    return kernel if record is None else template.make(record.config)
