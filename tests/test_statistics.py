from __future__ import annotations

from small_graphs import Net
from tvm import relax

from lpsn_tvm.statistics import activation_elements, count_macs, count_parameters, peak_activation_elements


def chain(residual: bool) -> object:
    net = Net((1, 3, 8, 8))
    x = net.emit(relax.op.nn.relu(net.conv(net.input, 4, name="conv1")), "relu1")
    y = net.conv(x, 4, name="conv2")
    y = net.emit(relax.op.add(y, x), "sum") if residual else y
    y = net.emit(relax.op.nn.max_pool2d(y, (2, 2), (2, 2)), "pool")
    return net.module(net.dense(net.emit(relax.op.reshape(y, (1, 64)), "flat"), 5, name="fc"))


def test_counts_by_hand() -> None:
    mod = chain(residual=False)
    assert count_macs(mod) == 64 * (4 * 27 + 4 * 36) + 64 * 5
    assert count_parameters(mod) == 4 * 28 + 4 * 37 + 65 * 5
    assert activation_elements(mod) == 256 + 256 + 5


def test_peak_is_two_neighbouring_values() -> None:
    # relu1 takes conv1's place; conv2 needs its input and its output.
    assert peak_activation_elements(chain(residual=False)) == 256 + 256


def test_residual_keeps_its_operand_alive_but_adds_in_place() -> None:
    assert peak_activation_elements(chain(residual=True)) == 256 + 256


def test_value_that_is_read_again_is_not_overwritten() -> None:
    net = Net((1, 4, 8, 8))
    x = net.conv(net.input, 4, name="conv1")
    a = net.emit(relax.op.nn.relu(x), "a")
    b = net.emit(relax.op.sigmoid(x), "b")
    mod = net.module(net.emit(relax.op.concat([a, b], axis=1), "both"))
    # a must not overwrite x, which b reads; b may. The concatenation needs both and its own.
    assert peak_activation_elements(mod) == 256 + 256 + 512
