from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_graphs import Net
from tvm import relax

from lpsn_tvm.errors import QuantizeError
from lpsn_tvm.interpreter import TorchInterpreter
from lpsn_tvm.passes.histogram import BINS, Histogram
from lpsn_tvm.passes.observers import KINDS, make_observer, observe, params_from_range
from lpsn_tvm.quant import QuantScheme, fake_quantize

UINT8 = QuantScheme()
INT8 = QuantScheme(activation_signed=True, activation_symmetric=True)
VTA = QuantScheme(activation_signed=True, activation_symmetric=True, power_of_two=True)
SIGNED = QuantScheme(activation_signed=True)
SCHEMES = {"uint8": UINT8, "int8 symmetric": INT8, "power of two": VTA, "int8 asymmetric": SIGNED}


def batches(kind: str, count: int = 6) -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    draw = {
        "normal": lambda: rng.standard_normal((16, 8, 16, 16)),
        "relu": lambda: np.maximum(rng.standard_normal((16, 8, 16, 16)), 0),
        "long tail": lambda: np.maximum(rng.laplace(size=(16, 8, 16, 16)) ** 3, 0),
    }[kind]
    return [torch.tensor(draw().astype(np.float32)) for _ in range(count)]


def error_of(data: list[torch.Tensor], low: float, high: float, bits: int, scheme: QuantScheme) -> float:
    values = torch.cat(data).numpy()
    return float(((fake_quantize(values, params_from_range(low, high, bits, scheme)) - values) ** 2).mean())


# --- parameters ---


@given(
    low=st.floats(-1.6e38, 1.6e38),
    span=st.floats(0, 1.6e38),
    bits=st.integers(2, 8),
    scheme=st.sampled_from(list(SCHEMES.values())),
)
@settings(max_examples=300, deadline=None)
def test_parameters_are_always_valid(low: float, span: float, bits: int, scheme: QuantScheme) -> None:
    high = low + span
    params = params_from_range(low, high, bits, scheme)
    scale = np.float32(params.scale)
    assert np.isfinite(scale) and scale >= np.finfo(np.float32).tiny and np.isfinite(1 / scale)
    assert params.qmin <= params.zero_point <= params.qmax
    assert fake_quantize(np.zeros(1, np.float32), params)[0] == 0.0
    assert params.signed == scheme.activation_signed
    if scheme.activation_symmetric:
        assert params.zero_point == 0
    if scheme.power_of_two:
        assert np.log2(scale) == np.rint(np.log2(scale))


def test_parameters_by_hand() -> None:
    params = params_from_range(0.0, 25.5, 8, UINT8)
    assert (float(params.scale), params.zero_point) == (pytest.approx(0.1), 0)
    params = params_from_range(-1.0, 2.0, 2, UINT8)
    assert (float(params.scale), params.zero_point) == (1.0, 1)
    params = params_from_range(-1.0, 12.7, 8, INT8)
    assert (float(params.scale), params.zero_point) == (pytest.approx(0.1), 0)
    assert float(params_from_range(0.0, 12.7, 8, VTA).scale) == 0.125
    assert float(params_from_range(0.0, 127.00000001, 8, VTA).scale) == 1.0, "float noise does not double the step"
    assert params_from_range(5.0, 6.0, 8, UINT8).real_range == pytest.approx((0.0, 6.0)), "zero is included"
    assert params_from_range(-6.0, -5.0, 8, UINT8).real_range == pytest.approx((-6.0, 0.0))


@pytest.mark.parametrize(("low", "high"), [(np.nan, 1), (0, np.inf), (2, 1)], ids=str)
def test_bad_ranges_and_bits_are_refused(low: float, high: float) -> None:
    with pytest.raises(QuantizeError, match="range"):
        params_from_range(low, high, 8, UINT8)
    with pytest.raises(QuantizeError, match="9 bits"):
        params_from_range(0, 1, 9, UINT8)


# --- histogram ---


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_growing_histogram_equals_one_made_at_once(numbers: list[float], parts: int) -> None:
    histogram = Histogram()
    for part in np.array_split(np.array(numbers, np.float32), parts):
        if len(part):
            histogram.add(torch.from_numpy(part), float(part.min()), float(part.max()))
    values = np.array(numbers, np.float32)
    assert histogram.total == len(values)
    assert histogram.zeros == int((values == 0).sum())
    if histogram.width:
        index = np.floor(values[values != 0].astype(np.float64) / histogram.width).astype(np.int64) - histogram.start
        np.testing.assert_array_equal(histogram.counts, np.bincount(index, minlength=BINS))


def test_histogram_uses_its_bins() -> None:
    histogram = Histogram()
    histogram.add(torch.linspace(0.1, 1.0, 100_000), 0.1, 1.0)
    assert (histogram.counts > 0).sum() > BINS // 2 - 1


@pytest.mark.parametrize("width", [49, 64, 63])
def test_samples_of_large_tensors_visit_all_columns(width: int) -> None:
    histogram = Histogram()
    tensor = (torch.arange(width) / width + 0.25).expand(16, 64, 64, width)
    histogram.add(tensor, 0.25, 1.25)
    assert 1 << 15 < histogram.total <= 1 << 17
    mean = float(np.dot(histogram.counts, histogram.centers) / histogram.total)
    assert mean == pytest.approx(float(tensor.mean()), abs=0.01)


# --- observers ---


@pytest.mark.parametrize("kind", KINDS)
def test_relu_outputs_start_at_exactly_zero(kind: str) -> None:
    observer = make_observer(kind)
    for batch in batches("relu"):
        observer.update(batch)
    low, high = observer.range(4, UINT8)
    assert low == 0.0 and 0 < high <= observer.high


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e-42], ids=["zero", "positive", "negative", "denormal"])
def test_constant_tensors_get_valid_parameters(kind: str, scheme: str, value: float) -> None:
    observer = make_observer(kind)
    for _ in range(2):
        observer.update(torch.full((2, 3), value))
    params = observer.params(8, SCHEMES[scheme])
    restored = fake_quantize(np.full(4, value, np.float32), params)
    assert np.isfinite(restored).all() and abs(float(restored[0]) - value) <= max(0.02 * abs(value), 1e-10)


def test_minmax_is_the_running_mean_of_the_papers() -> None:
    observer = make_observer("minmax")
    for low, high in ((-1.0, 2.0), (-3.0, 6.0)):
        observer.update(torch.tensor([[low, 0.5], [0.0, high]]))
    assert observer.range(8, UINT8) == (-2.0, 4.0)
    observer.update(torch.tensor([[-1.0, 1.0]]))
    assert observer.range(8, UINT8) == (pytest.approx(-9 / 5), pytest.approx(17 / 5)), (
        "a batch of one counts half of one of two"
    )


def test_percentile_is_numpys() -> None:
    observer = make_observer("percentile")
    data = batches("normal")
    for batch in data:
        observer.update(batch)
    expected = np.percentile(torch.cat(data).numpy(), [0.01, 99.99])
    np.testing.assert_allclose(observer.range(8, UINT8), expected, rtol=0.03)


@pytest.mark.parametrize("distribution", ["normal", "relu", "long tail"])
@pytest.mark.parametrize("scheme", ["uint8", "power of two"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_clipping_is_the_best_of_a_full_search(distribution: str, scheme: str, bits: int) -> None:
    data = batches(distribution, 2)
    observer = make_observer("mse")
    for batch in data:
        observer.update(batch)
    ours = error_of(data, *observer.range(bits, SCHEMES[scheme]), bits, SCHEMES[scheme])
    shares = np.linspace(0.01, 1, 60)
    best = min(error_of(data, observer.low * s, observer.high * s, bits, SCHEMES[scheme]) for s in shares)
    assert ours <= 1.05 * best


def test_entropy_clips_the_tail_and_keeps_the_bulk() -> None:
    data = batches("long tail")
    observer = make_observer("entropy")
    for batch in data:
        observer.update(batch)
    low, high = observer.range(4, UINT8)
    assert low == 0.0
    assert np.percentile(torch.cat(data).numpy(), 99) < high < 0.5 * observer.high


@pytest.mark.parametrize("kind", ["mse", "percentile"])
def test_clipping_beats_minmax_at_four_bits_on_long_tails(kind: str) -> None:
    data = batches("long tail")
    observer, minmax = make_observer(kind), make_observer("minmax")
    for batch in data:
        observer.update(batch)
        minmax.update(batch)
    assert error_of(data, *observer.range(4, UINT8), 4, UINT8) < error_of(data, *minmax.range(4, UINT8), 4, UINT8)


def test_observers_do_not_depend_on_how_data_is_batched() -> None:
    whole = torch.cat(batches("normal"))
    ranges = []
    for size in (16, 32, 96):
        observer = make_observer("mse")
        for part in whole.split(size):
            observer.update(part)
        ranges.append(observer.range(4, UINT8))
    np.testing.assert_allclose(ranges, [ranges[0]] * 3, rtol=0.05)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(QuantizeError, match="NaN or infinite"):
        make_observer("mse").update(torch.tensor([1.0, value]))


def test_unknown_kind_and_empty_observer_are_refused() -> None:
    with pytest.raises(QuantizeError, match="minmax, percentile, mse, entropy"):
        make_observer("best")
    with pytest.raises(QuantizeError, match="no values"):
        make_observer("mse").range(8, UINT8)


# --- observe ---


def network() -> TorchInterpreter:
    net = Net((1, 3, 8, 8))
    x = net.emit(relax.op.nn.relu(net.conv(net.input, 4, name="conv1")), "relu1")
    return TorchInterpreter(net.module(net.emit(relax.op.exp(net.conv(x, 4, name="conv2")), "out")))


def feeds() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"input": rng.standard_normal((n, 3, 8, 8)).astype(np.float32)} for n in (4, 4, 2)]


def test_observe_sees_inputs_inner_values_and_sums_before_the_bias() -> None:
    interpreter, calls = network(), []
    names = ["input", "relu1", "conv2.acc"]
    observers = observe(interpreter, feeds(), names, "minmax", progress=lambda done, total: calls.append((done, total)))
    values: dict[str, Any] = {n: torch.cat([interpreter.run(f, fetch=[n])[n] for f in feeds()]) for n in names}
    for name, observer in observers.items():
        assert observer.batches == 3
        assert (observer.low, observer.high) == (float(values[name].min()), float(values[name].max()))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_observe_computes_nothing_beyond_what_is_asked() -> None:
    interpreter = network()
    interpreter.set_params("conv2", interpreter.params["conv2"][0] * np.nan, interpreter.params["conv2"][1])
    observe(interpreter, feeds(), ["relu1"])
    with pytest.raises(QuantizeError, match=r"conv2.*NaN"):
        observe(interpreter, feeds(), ["relu1", "conv2"])
    with pytest.raises(QuantizeError, match="no calibration data"):
        observe(interpreter, [], ["relu1"])
