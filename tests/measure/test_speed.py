"""The verb: what is timed beside what, what a refusal becomes, the numbers made of times. Times are planted."""

import gc
import itertools
import re
import statistics
import weakref
from dataclasses import replace

import pytest
import torch

from fewedges.errors import FewedgesError, RecipeError
from fewedges.measure import clock, speed
from fewedges.measure.hardware import FIELDS
from fewedges.measure.setting import counts_of, parse_shape, resolve
from fewedges.measure.speed import floor_ms, hardware
from fewedges.measure.ways import WAYS, Built, Case, Way
from tiny import tiny_loaded

SMALL = {"shapes": ["64x128"], "densities": [0.1, 0.5], "rows": 4, "repeats": 3}
PEAKS = {"flops": 1e9, "bandwidth": 1e9}
MS = {"dense": 10.0, "masked": 20.0, "csr": 5.0, "butterfly": 2.0}


@pytest.fixture
def planted(monkeypatch):
    """Ways take the milliseconds of MS, 10 % less and more in turn; rounds are remembered."""
    rounds = []

    def interleaved(runs, device, repeats=30, **_):
        rounds.append(list(runs))
        for run in runs.values():
            run()
        swing = itertools.cycle([1.0, 0.9, 1.1])
        factors = [next(swing) for _ in range(repeats)]
        return {name: [MS.get(name, 1.0) * factor for factor in factors] for name in runs}

    monkeypatch.setattr(speed, "interleaved", interleaved)
    monkeypatch.setattr(speed, "peaks", lambda *_: dict(PEAKS))
    return rounds


@pytest.fixture
def quick_clock(monkeypatch):
    monkeypatch.setitem(clock.FLUSH_MIB, "cpu", 1)
    monkeypatch.setattr(speed, "peaks", lambda *_: dict(PEAKS))


@pytest.mark.stays
def test_every_way_has_a_row_at_every_density_and_none_is_silently_absent(quick_clock):
    found = hardware(**SMALL)
    for name, way in WAYS.items():
        rows = [row for row in found.rows if row["what"] == name]
        assert len(rows) == (1 if name == "dense" or way.density else 2), name
        assert all(("why" in row) != ("ms_p50" in row) for row in rows)
        assert all(row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] for row in rows if "ms_p50" in row)
    assert {"bsr 32", "csr", "masked", "butterfly"} <= {row["what"] for row in found.rows if "ms_p50" in row}
    assert all(set(row) <= set(FIELDS) for row in found.rows)
    refused = {row["what"]: row["why"] for row in found.rows if "why" in row}
    assert "CUDA" in refused["2:4"]
    assert "pixelated (triton)" in refused


@pytest.mark.matches
@pytest.mark.parametrize(
    ("vectors", "bandwidth", "memory"),
    [(4, 1e9, False), (1, 1e9, True), (4, 1e8, True)],  # memory alone bounds few vectors, or a slow one
)
def test_speed_ups_shares_and_limits_by_hand(planted, monkeypatch, vectors, bandwidth, memory):
    monkeypatch.setattr(speed, "peaks", lambda *_: {"flops": 1e9, "bandwidth": bandwidth})

    def floor_of(parameters):  # in ms; the case says what bounds it
        return 4e3 * (192 * vectors + parameters) / bandwidth if memory else 2e3 * vectors * parameters / 1e9

    found = hardware(**{**SMALL, "rows": vectors}, ways=["masked", "csr"])
    dense, *rows = found.rows
    assert [(row["what"], row["asked"]) for row in rows] == [(w, d) for w in ("masked", "csr") for d in (0.1, 0.5)]
    assert (dense["what"], dense["ms_p50"], dense["repeats"]) == ("dense", pytest.approx(10.0), 6)
    for row in rows:
        assert row["parameters"] == {0.1: 820, 0.5: 4096}[row["asked"]]
        assert row["density"] == row["parameters"] / 8192
        assert row["speedup"] == pytest.approx(10 / MS[row["what"]], rel=1e-12)
        floor = floor_of(row["parameters"])
        assert row["floor_ms"] == pytest.approx(floor, rel=1e-12)
        assert row["roofline"] == pytest.approx(floor / MS[row["what"]], rel=1e-12)
        assert row["limit"] == pytest.approx(10 / floor, rel=1e-12)
        assert (row["M"], row["dtype"], row["shape"]) == (vectors, "float32", "64x128")
    assert dense["roofline"] == pytest.approx(floor_of(8192) / 10, rel=1e-12)


@pytest.mark.matches
def test_a_speed_up_compares_runs_of_one_round_and_its_spread_is_that_of_pairs(planted, monkeypatch):
    dense, ours = [10.0, 20.0, 30.0, 40.0], [5.0, 5.0, 10.0, 8.0]
    monkeypatch.setattr(speed, "interleaved", lambda runs, *_, **__: {"dense": dense, "masked": ours} if runs else {})
    found = hardware(shapes=["64x128"], densities=[0.5], rows=4, repeats=4, ways=["masked"])
    (row,) = (row for row in found.rows if row["what"] == "masked")
    cuts = statistics.quantiles([a / b for a, b in zip(dense, ours, strict=True)], n=10)
    assert (row["speedup"], row["dense_ms_p50"]) == (25 / 6.5, 25)
    assert (row["speedup_p20"], row["speedup_p80"]) == (cuts[1], cuts[7])


@pytest.mark.stays
def test_dense_runs_in_every_round_and_twice_as_large_a_floor_is_never_less(planted):
    hardware(**SMALL, ways=["masked", "butterfly"])
    assert planted == [["dense", "masked", "butterfly"]] * 2
    planted.clear()
    few = {**SMALL, "densities": [0.1]}
    hardware(**few, ways=["masked", "2:4"])  # a round of which nothing can be had is not timed
    dense, refused = hardware(**few, ways=["2:4"]).rows  # but dense always is
    assert (planted, dense["repeats"], "why" in refused) == ([["dense", "masked"], ["dense"]], 3, True)
    small, large = (floor_ms((64, 128), density, 4, 4, PEAKS) for density in (0.25, 0.5))
    assert small < large <= 2 * small


@pytest.mark.matches
def test_the_faster_of_two_calls_is_timed(planted, monkeypatch):
    times = {"W @ x.T": [9.0, 8.0, 7.0], "F.linear(x, W)": [6.0, 9.0, 9.0]}
    monkeypatch.setattr(speed, "interleaved", lambda runs, *_, **__: {n: times.get(n, [5.0] * 3) for n in runs})
    found = hardware(**SMALL, ways=["csr"])
    assert {row["how"] for row in found.rows if row["what"] == "csr"} == {"F.linear(x, W)"}


@pytest.mark.matches
@pytest.mark.parametrize(
    ("ms", "tries", "best"),
    [
        ({"W @ x.T": [[250.0], []], "F.linear(x, W)": [[240.0], []]}, [2], "F.linear(x, W)"),
        ({"W @ x.T": [[250.0], []], "F.linear(x, W)": [[90.0], []]}, [2], "F.linear(x, W)"),
        ({"W @ x.T": [[4.0], [5.0, 3.0, 6.0]], "F.linear(x, W)": [[3.5], [4.0, 4.0, 9.0]]}, [2, 2], "W @ x.T"),
    ],
)
def test_slow_calls_are_tried_once(planted, monkeypatch, ms, tries, best):
    """Planted: what each call takes at the first try, and in the three after it."""
    made = []

    def interleaved(runs, device, repeats=30, **_):
        if "dense" in runs:
            return {name: [5.0] * repeats for name in runs}
        made.append(len(runs))
        return {name: ms[name][repeats > 1] for name in runs}

    monkeypatch.setattr(speed, "interleaved", interleaved)
    found = hardware(**{**SMALL, "densities": [0.1]}, ways=["csr"])
    assert (made, found.rows[1]["how"]) == (tries, best)


@pytest.mark.matches
def test_a_way_with_fewer_repeats_is_compared_with_dense_in_these(planted, monkeypatch):
    dense, ours, asked = [10.0, 20.0, 30.0, 1.0, 1.0, 1.0, 1.0], [200.0, 500.0, 300.0], []

    def interleaved(runs, device, repeats=30, **rest):
        asked.append((rest["seconds"], rest["always"]))
        return {"dense": dense, "masked": ours}

    monkeypatch.setattr(speed, "interleaved", interleaved)
    found = hardware(shapes=["64x128"], densities=[0.5], rows=4, repeats=7, ways=["masked"])
    whole, row = found.rows
    cuts = statistics.quantiles([0.05, 0.04, 0.1], n=10)
    assert (row["repeats"], row["dense_ms_p50"], row["ms_p50"], row["speedup"]) == (3, 20.0, 300.0, 20 / 300)
    assert (row["speedup_p20"], row["speedup_p80"]) == (pytest.approx(cuts[1]), pytest.approx(cuts[7]))
    assert (whole["repeats"], whole["ms_p50"]) == (7, 1.0)
    assert asked == [(found.facts["way_seconds"], ["dense"])]
    assert "(slow ways fewer: masked 3)" in found.protocol()


@pytest.mark.matches
def test_errors_are_against_float64(planted, monkeypatch):
    def off(case):
        built = WAYS["dense"].build(case)
        (call,) = built.calls.values()
        return Built({"x": lambda: call() * (1 + 1e-4)}, built.pattern, built.parameters, built.stored, built.exact)

    monkeypatch.setitem(WAYS, "off", Way(off))
    found = hardware(**SMALL, ways=["off", "masked"])
    errors = {row["what"]: row["error"] for row in found.rows}
    # float32 rounding of 64 terms beside a planted 1e-4: measured 1.000e-4 and 1.4e-7
    assert errors["off"] == pytest.approx(1e-4, rel=0.01)
    assert 0 < errors["masked"] < 5e-7


def broken(change):
    def build(case):
        built = WAYS["dense"].build(case)
        (call,) = built.calls.values()
        return Built({"x": lambda: change(call())}, built.pattern, built.parameters, built.stored, built.exact)

    return Way(build)


def explode(y):
    raise RuntimeError("no such kernel\nadvice that nobody wants")


@pytest.mark.survives
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y: y * 2, "wrong: relative error 1.0"),
        (lambda y: y.masked_fill(y == y.max(), float("nan")), "wrong: relative error nan"),
        (lambda y: y[:, :-1], "not \\(4, 128\\)"),
        (lambda y: y.T.contiguous().T, "contiguous"),
        (explode, "no such kernel$"),
    ],
)
def test_a_way_that_is_wrong_or_fails_is_a_row_with_the_reason(planted, monkeypatch, change, reason):
    monkeypatch.setitem(WAYS, "broken", broken(change))
    found = hardware(**SMALL, ways=["broken", "masked"])
    rows = [row for row in found.rows if row["what"] == "broken"]
    assert len(rows) == 2
    for row in rows:
        assert "ms_p50" not in row
        assert re.search(reason, row["why"])
    assert all("ms_p50" in row for row in found.rows if row["what"] == "masked")


@pytest.mark.survives
def test_a_shape_that_blocks_do_not_divide_has_reasons_and_dense(planted):
    found = hardware(shapes=["60x50"], densities=[0.3], rows=4, repeats=3, ways=["bsr 32"])
    dense, row = found.rows
    assert "32" in row["why"]
    assert dense["ms_p50"] == pytest.approx(10.0)


@pytest.mark.survives
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"shapes": ["64"]}, "inputs x outputs"),
        ({"shapes": ["0x5"]}, "inputs x outputs"),
        ({"densities": [0.0]}, "between 0 and 1"),
        ({"densities": []}, "between 0 and 1"),
        ({"dtype": "int8"}, "float32"),
        ({"device": "tpu"}, "cpu or cuda"),
        ({"device": "meta"}, "cpu"),
        ({"ways": ["ours"]}, "no way ours"),
        ({"ways": ["dense"]}, "always timed"),
        ({"repeats": 2}, "3 repeats"),
        ({"rows": 0}, "1 row"),
        ({"clock": "sun"}, "wall"),
        ({"clock": "graph"}, "graph, on cuda"),
        ({"model": "addition"}, "shapes of its own"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_anything_runs(wrong, words, monkeypatch):
    monkeypatch.setattr(speed, "peaks", lambda *_: pytest.fail("it ran"))
    with pytest.raises(RecipeError, match=words):
        hardware(**{**SMALL, **wrong})


@pytest.mark.survives
def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(FewedgesError, match="no GPU"):
        hardware(**SMALL, device="cuda")


@pytest.mark.matches
def test_a_models_shapes_are_its_matrices_inputs_first(planted):
    loaded = tiny_loaded("llama")  # width 32, 2 layers, key and value 16 wide, MLP 48
    name, counts = counts_of(loaded)
    assert name == "tiny-llama"
    assert counts == {"32x32": 4, "32x16": 4, "32x48": 4, "48x32": 2}
    found = hardware(loaded, densities=[0.5], rows=4, repeats=3, ways=["masked"])
    assert found.facts["model"] == {"name": "tiny-llama", "counts": dict(counts)}
    assert set(found.shapes()) == set(counts)
    assert parse_shape("1024X4096") == (1024, 4096)


@pytest.mark.matches
def test_conv1d_of_gpt2_counts_as_inputs_x_outputs_too():
    assert counts_of(tiny_loaded("gpt2"))[1]["32x128"] == 2


@pytest.mark.says
def test_the_facts_name_the_protocol(quick_clock):
    torch_threads = torch.get_num_threads()
    found = hardware(**SMALL, ways=["masked"], seed=5)
    facts = found.facts
    assert (facts["threads"], facts["repeats"], facts["seed"], facts["M"]) == (torch_threads, 3, 5, 4)
    assert (facts["flops"], facts["bandwidth"]) == (1e9, 1e9)
    assert facts["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert facts["processor"]
    assert len(facts["load"]) == 2
    told = []
    hardware(**SMALL, ways=["masked"], watch=told.append)
    assert [line.split(":")[0] for line in told] == ["64x128 density 0.1", "64x128 density 0.5"]


@pytest.mark.says
def test_defaults_are_thirty_repeats_and_quick_is_one_shape():
    assert speed.default("repeats", 30, False) == 30
    assert speed.default("shapes", speed.SHAPES, True) == ("1024x4096",)


@pytest.mark.matches
def test_on_a_gpu_calls_can_be_replayed_as_graphs_and_what_cannot_is_timed_as_it_is(monkeypatch, quick_clock):
    """The capture is planted: this machine has no GPU."""
    replays = []

    class Planted:
        def __init__(self, run):
            self.run, self.y = run, run()

        def replay(self):
            replays.append(self.run)
            self.y.copy_(self.run())

    def capture(run):
        if "mask" in run.__code__.co_freevars:
            raise RuntimeError("operation not permitted when stream is capturing")
        graph = Planted(run)
        return graph, graph.y

    monkeypatch.setattr(speed, "captured", capture)
    asked = {"device": "cpu", "dtype": None, "densities": [0.5], "rows": 8, "ways": None, "repeats": 3}
    wall = resolve(**asked, quick=False, seed=0, clock="wall")
    case = Case(torch.randn(8, 64), torch.randn(64, 64), 0.5)
    assert "how" in speed.time_round(case, ["butterfly"], wall)[0][0]
    assert not replays
    setting = replace(wall, clock="graph")
    rows, times = speed.time_round(case, ["masked", "butterfly"], setting)
    masked, butterfly = rows
    assert masked["how"] == "F.linear(x, W * mask)"
    assert "replayed" in butterfly["how"]
    assert all(row["error"] < 4e-7 for row in rows)  # measured 1.0e-7
    assert [len(times), *(row["repeats"] for row in rows)] == [3, 3, 3]
    assert len({id(run) for run in replays}) >= 2  # dense and the butterfly


@pytest.mark.stays
def test_a_replayed_call_keeps_what_it_reads(monkeypatch):
    """A graph knows addresses, not tensors: on an H100 replays read freed weights, an illegal access."""
    weight = torch.ones(3, 3)
    kept = weakref.ref(weight)

    def call(weight=weight):
        return weight @ weight

    class Graph:
        def replay(self):
            assert kept() is not None

    monkeypatch.setattr(speed, "captured", lambda run: (Graph(), run()))
    replay = speed.replayed(call)
    del weight, call
    gc.collect()
    assert torch.equal(replay(), torch.full((3, 3), 3.0))
    del replay
    gc.collect()
    assert kept() is None
