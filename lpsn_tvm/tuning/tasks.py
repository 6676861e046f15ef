"""What there is to tune in a network: its distinct templates, and how often each is used."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lpsn_tvm.schedules.template import Template
from lpsn_tvm.targets.backend import Backend
from lpsn_tvm.targets.choices import Choices


@dataclass(frozen=True)
class Task:
    """One template of a network.

    Parameters
    ----------
    template : Template
        With the constants of the first layer that uses it.
    nodes : tuple of str
        The layers that use it.
    """

    template: Template
    nodes: tuple[str, ...]

    @property
    def uses(self) -> int:
        """How often the network runs it."""
        return len(self.nodes)

    @property
    def label(self) -> str:
        """Name for people: the first layer, and how many others are equal."""
        return self.nodes[0] + (f" (x{self.uses})" if self.uses > 1 else "")


def extract(backend: Backend, mod: Any) -> list[Task]:
    """Tasks of a network as the backend lowers it, in order of first use; templates with one configuration are none."""
    choices = Choices()
    replace(backend, on_choice=choices).lower(mod)
    nodes: dict[str, list[str]] = {}
    templates: dict[str, Template] = {}
    for choice in choices:
        templates.setdefault(choice.template.key, choice.template)
        nodes.setdefault(choice.template.key, []).append(choice.node)
    tasks = [Task(template, tuple(nodes[key])) for key, template in templates.items()]
    return [task for task in tasks if has_choice(task.template)]


def has_choice(template: Template) -> bool:
    """Whether there is more than one valid configuration."""
    configs = template.configs()
    return next(configs, None) is not None and next(configs, None) is not None
