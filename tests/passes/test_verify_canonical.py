"""verify_canonical: every rule is named when it is broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tvm import relax

from lpsn_tvm.errors import ModelError
from lpsn_tvm.passes.verify_canonical import verify_canonical
from tests.support.relax_nets import Bind, channel, const, function, random

op = relax.op
Body = Callable[[Bind, Any], Any]
W = random(4, 3, 3, 3)


def good(bind: Bind, x: Any) -> Any:
    return bind(
        "r",
        op.nn.relu(
            bind("c", op.add(bind("c.acc", op.nn.conv2d(x, const(W), padding=(1, 1, 1, 1))), channel(np.zeros(4))))
        ),
    )


def shared_accumulator(bind: Bind, x: Any) -> Any:
    acc = bind("c.acc", op.nn.conv2d(x, const(W), padding=(1, 1, 1, 1)))
    return [bind("c", op.add(acc, channel(np.zeros(4)))), bind("t", op.tanh(acc))]


def infinite(bind: Bind, x: Any) -> Any:
    return bind(
        "c", op.add(bind("c.acc", op.nn.conv2d(x, const(W * np.inf), padding=(1, 1, 1, 1))), channel(np.zeros(4)))
    )


BROKEN: dict[str, tuple[Body, str]] = {
    "twice": (lambda bind, x: bind("a", op.tanh(bind("a", op.nn.relu(x)))), "a: rule 2"),
    "no-bias": (lambda bind, x: bind("c", op.nn.conv2d(x, const(W), padding=(1, 1, 1, 1))), "c: rule 3"),
    "shared-accumulator": (shared_accumulator, "c.acc: rule 3"),
    "not-finite": (infinite, "layer 'c': the weights are not finite"),
    "mean-flat": (lambda bind, x: bind("m", op.mean(x, [2, 3], False)), "m: rule 6"),
    "foreign-operator": (
        lambda bind, x: bind("s", op.cumsum(x, 1)),
        "node 's': operator relax.cumsum is not in canonical form",
    ),
    "integer": (lambda bind, x: bind("i", op.astype(x, "int32")), "node 'i'"),
    "constant-first": (lambda bind, x: bind("a", op.add(const(1.0), x)), "a: a constant of a commutative operator"),
    "ceil-mode": (
        lambda bind, x: bind("p", op.nn.max_pool2d(x, (2, 2), ceil_mode=True)),
        "p: pooling has ceil_mode False",
    ),
}


def test_a_canonical_module_passes() -> None:
    verify_canonical(function(good, x=(1, 3, 4, 5)))


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_rule_is_named(name: str) -> None:
    body, message = BROKEN[name]
    with pytest.raises(ModelError, match=message.replace(".", r"\.")):
        verify_canonical(function(body, x=(1, 3, 4, 5)))
