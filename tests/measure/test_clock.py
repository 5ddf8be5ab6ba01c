"""Timing: what is called how often, whose bytes are counted. No test asserts a time."""

from collections import Counter
from functools import partial

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


def on_a_fake_clock(costs, **rest):
    """Times of calls that cost these milliseconds, and the names of all calls in order."""
    now, made = [0.0], []

    def call(name):
        made.append(name)
        now[0] += costs[name] / 1e3

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(clock.CLOCKS, "wall", lambda: now[0])
        return interleaved({name: partial(call, name) for name in costs}, CPU, **rest), made


@pytest.mark.matches
def test_a_slow_call_takes_part_in_the_first_repeats_and_dense_in_all():
    costs = {"dense": 300.0, "fast": 1.0, "middling": 70.0, "slow": 250.0, "crawling": 600.0}
    found, made = on_a_fake_clock(costs, repeats=30, seconds=2.0, always=["dense"])
    # of 2,000 ms: 28 calls of 70 less 3 warm-ups, 8 of 250 less 1, 3 of 600 and so the least
    counts = {"dense": 30, "fast": 30, "middling": 25, "slow": 7, "crawling": clock.LEAST}
    assert {name: len(times) for name, times in found.items()} == counts
    assert all(times == pytest.approx([costs[name]] * counts[name]) for name, times in found.items())
    warm_ups = {"dense": 3, "fast": 3, "middling": 3, "slow": 1, "crawling": 1}
    start = sum(warm_ups.values())
    assert Counter(made[:start]) == warm_ups
    for repeat in range(30):
        present = {name for name, count in counts.items() if repeat < count}
        assert set(made[start : start + len(present)]) == present
        start += len(present)
    assert start == len(made)


@pytest.mark.stays
@settings(max_examples=30, deadline=None)
@given(ms=st.floats(0.1, 5000), seconds=st.floats(0.1, 3), repeats=st.integers(3, 30))
def test_a_bounded_call_costs_no_more_than_its_seconds_or_has_the_least_repeats(ms, seconds, repeats):
    found, made = on_a_fake_clock({"x": ms}, repeats=repeats, seconds=seconds)
    count = len(found["x"])
    assert min(clock.LEAST, repeats) <= count <= repeats
    assert count <= clock.LEAST or len(made) * ms <= 1e3 * seconds * (1 + 1e-9)
    assert count == repeats or (len(made) + 1) * ms >= 1e3 * seconds * (1 - 1e-9)  # no more would fit


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
