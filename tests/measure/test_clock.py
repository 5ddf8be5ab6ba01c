"""Timing: what is called how often, whose bytes are counted. No test asserts a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.measure import clock
from fewedges.measure.clock import interleaved, peak_bytes, peaks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_flush(monkeypatch):
    monkeypatch.setitem(clock.FLUSH_MIB, "cpu", 1)


@pytest.mark.stays
@settings(max_examples=10, deadline=None)
@given(repeats=st.integers(1, 6), warm_ups=st.integers(0, 3), ways=st.integers(1, 4), seed=st.integers(0, 9))
def test_every_repeat_makes_each_call_once_after_the_warm_ups(repeats, warm_ups, ways, seed):
    made = []
    runs = {str(way): (lambda way=way: made.append(way)) for way in range(ways)}
    found = interleaved(runs, CPU, repeats, seed=seed, warm_ups=warm_ups)
    assert {name: len(times) for name, times in found.items()} == dict.fromkeys(runs, repeats)
    assert made[: ways * warm_ups] == [way for way in range(ways) for _ in range(warm_ups)]
    timed = made[ways * warm_ups :]
    for repeat in range(repeats):
        assert sorted(timed[repeat * ways : (repeat + 1) * ways]) == list(range(ways))


@pytest.mark.reproduces
def test_the_order_is_drawn_and_comes_from_the_seed():
    def order(seed):
        made = []
        runs = {str(way): (lambda way=way: made.append(way)) for way in range(5)}
        interleaved(runs, CPU, 8, seed=seed, warm_ups=0)
        return made

    assert order(0) == order(0) != order(1)
    first = [order(0)[repeat * 5 : repeat * 5 + 5] for repeat in range(8)]
    assert len({tuple(one) for one in first}) > 1


@pytest.mark.matches
@pytest.mark.parametrize("name", clock.CLOCKS)
def test_a_time_is_what_the_clock_says_between_before_and_after(name, monkeypatch):
    ticks = iter([10.0, 10.5, 20.0, 20.25])
    monkeypatch.setitem(clock.CLOCKS, name, lambda: next(ticks))
    assert interleaved({"x": lambda: None}, CPU, 2, clock=name) == {"x": [500.0, 250.0]}


@pytest.mark.stays
def test_the_cache_is_cold_before_each_timed_call():
    """The buffer is written before the clock starts, once a call, and is as large as said."""
    written = []

    class Buffer(torch.Tensor):
        def fill_(self, value):
            written.append(self.numel())
            return super().fill_(value)

    real = torch.empty
    try:
        torch.empty = lambda *shape, **rest: real(*shape, **rest).as_subclass(Buffer)
        interleaved({"a": lambda: written.append("a"), "b": lambda: written.append("b")}, CPU, 2, warm_ups=0)
    finally:
        torch.empty = real
    assert written[0::2] == [clock.FLUSH_MIB["cpu"] * 2**20] * 4
    assert sorted(written[1::2]) == ["a", "a", "b", "b"]


@pytest.mark.matches
def test_peak_bytes_are_those_of_new_tensors_while_they_live():
    x = torch.ones(1000)  # 4,000 bytes, there before: not counted

    def freed():
        y = x + 1  # 4,000
        z = torch.cat([y, y])  # 8,000; 12,000 with y
        del y
        w = torch.cat([z, z[:500]])  # 10,000; 18,000 with z
        del z
        return torch.cat([w, w])  # 20,000; 30,000 with w

    def views():
        return (x + 1)[:500].view(50, 10).T  # one storage

    assert peak_bytes(freed, CPU) == 30_000
    assert peak_bytes(views, CPU) == 4_000
    assert peak_bytes(lambda: x.mul_(1), CPU) == 0
    assert peak_bytes(lambda: x[10:], CPU) == 0
    assert peak_bytes(lambda: (x + 1, x + 2), CPU) == 8_000


@pytest.mark.matches
def test_peaks_count_two_operations_a_product_and_bytes_both_ways(monkeypatch):
    def one_second(calls, device, repeats, **_):
        for call in calls.values():
            call()
        return {name: [2000.0, 1000.0] for name in calls}

    monkeypatch.setattr(clock, "interleaved", one_second)
    assert peaks(CPU, torch.float32, quick=True) == {"flops": 2 * 1024**3, "bandwidth": 2 * 2**25}
