"""The verb, stopped and started again: what its file holds after every round, what it refuses. Times are planted."""

from contextlib import nullcontext

import pytest

from fewedges import store
from fewedges.errors import RecipeError
from fewedges.measure import speed
from fewedges.measure.hardware import Hardware
from fewedges.measure.speed import hardware
from fewedges.measure.ways import WAYS, Way
from tiny import tiny_loaded

SMALL = {"shapes": ["64x128"], "densities": [0.1, 0.5], "rows": 4, "repeats": 3}
MS = {"dense": 10.0, "masked": 20.0, "butterfly": 2.0}
TWO = {**SMALL, "shapes": ["64x128", "32x64"], "ways": ["masked", "butterfly", "2:4"]}
MEASURED = ("load", "seconds", "starts")


@pytest.fixture
def stoppable(monkeypatch):
    """Every round has times of its own; the round named in `stop` is broken off. Peaks as in `peaks`, in turn."""

    class Planted:
        def __init__(self):
            self.stop, self.rounds, self.peaks = None, 0, []

        def interleaved(self, runs, device, repeats=30, **_):
            if self.rounds == self.stop:
                raise KeyboardInterrupt
            self.rounds += 1
            return {name: [MS[name] + self.rounds + n / 8 for n in range(repeats)] for name in runs}

        def peak(self, *_):
            value = self.peaks.pop(0) if self.peaks else 1e9
            return {"flops": value, "bandwidth": value}

    planted = Planted()
    monkeypatch.setattr(speed, "interleaved", planted.interleaved)
    monkeypatch.setattr(speed, "peaks", planted.peak)
    return planted


def bare(found):
    """Without what no two runs share."""
    return found.rows, {name: value for name, value in found.facts.items() if name not in MEASURED}


@pytest.mark.reproduces
@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_a_run_that_was_stopped_goes_on_to_the_same_result(stoppable, tmp_path, stop):
    hardware(**TWO, out=tmp_path / "whole")
    stoppable.rounds, stoppable.stop = 0, stop
    with pytest.raises(KeyboardInterrupt):
        hardware(**TWO, out=tmp_path / "parts")
    left = Hardware.load(tmp_path / "parts")
    assert left.unfinished == f"{stop} of 4 rounds"
    assert str(left)
    assert (tmp_path / "parts" / "hardware.csv").read_text() == left.csv()
    stoppable.stop, told = None, []
    found = hardware(**TWO, out=tmp_path / "parts", watch=told.append)
    assert stoppable.rounds == 4  # none was timed again
    assert told[0].endswith(f"{stop} of 4 rounds done before, not timed again")
    assert len(told) == 1 + 4 - stop
    assert bare(found) == bare(Hardware.load(tmp_path / "whole")) == bare(Hardware.load(tmp_path / "parts"))
    assert (found.facts["starts"], found.unfinished) == (2, "")


@pytest.mark.matches
def test_after_every_round_the_file_holds_it_and_dense_joins_the_times_of_all(stoppable, tmp_path):
    seen = []
    found = hardware(**TWO, out=tmp_path, watch=lambda _: seen.append(Hardware.load(tmp_path)))
    assert [one.unfinished for one in seen] == [f"{n} of 4 rounds" for n in (1, 2, 3, 4)]
    assert [len(one.rows) for one in seen] == [3, 6, 9, 12]  # 2:4 has one row, at the second density
    assert [one.timed("64x128", "dense")[0]["repeats"] for one in seen] == [3, 6, 6, 6]
    assert [one.timed("64x128", "dense")[0]["ms_p50"] for one in seen[:2]] == [11.125, 11.625]
    assert bare(found) == bare(Hardware.load(tmp_path))
    assert "unfinished" not in found.facts


@pytest.mark.matches
def test_rows_are_rated_by_the_best_peaks_known_by_then(stoppable, tmp_path):
    stoppable.stop, stoppable.peaks = 1, [1e9]
    with pytest.raises(KeyboardInterrupt):
        hardware(**TWO, out=tmp_path)
    before = Hardware.load(tmp_path)
    stoppable.stop, stoppable.peaks = None, [4e9, 2e9]
    after = hardware(**TWO, out=tmp_path)
    assert (before.facts["flops"], after.facts["flops"]) == (1e9, 4e9)
    for what in ("dense", "masked"):
        old, new = (found.timed("64x128", what)[0] for found in (before, after))
        assert old["floor_ms"] == pytest.approx(4 * new["floor_ms"])
        assert new["roofline"] == pytest.approx(new["floor_ms"] / new["ms_p50"])


@pytest.mark.stays
def test_a_finished_run_is_not_timed_again(stoppable, tmp_path, monkeypatch):
    found, told = hardware(**TWO, out=tmp_path), []
    text = (tmp_path / "hardware.json").read_text()
    monkeypatch.setattr(speed, "peaks", lambda *_: pytest.fail("it ran"))
    assert hardware(**TWO, out=tmp_path, watch=told.append) == found
    assert told == [f"{tmp_path}: all rounds done before, not timed again"]
    assert (tmp_path / "hardware.json").read_text() == text


@pytest.mark.survives
@pytest.mark.parametrize("stop", [1, None])
@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"shapes": ["64x128"]}, "shapes .*asked .'64x128'."),
        ({"densities": [0.1]}, r"densities \[0.1, 0.5\] \(asked \[0.1\]\)"),
        ({"ways": ["masked"]}, "ways .*asked .'masked'."),
        ({"rows": 8}, r"M 4 \(asked 8\)"),
        ({"dtype": "bfloat16"}, "dtype float32 .asked bfloat16.*itemsize 4"),
        ({"repeats": 4}, r"repeats 3 \(asked 4\)"),
        ({"seed": 1}, r"seed 0 \(asked 1\)"),
        ({"quick": True}, r"quick False \(asked True\)"),
    ],
)
def test_a_run_of_other_settings_is_never_mixed_in(stoppable, tmp_path, monkeypatch, other, words, stop):
    stoppable.stop = stop
    with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
        hardware(**TWO, out=tmp_path)
    text = (tmp_path / "hardware.json").read_text()
    monkeypatch.setattr(speed, "peaks", lambda *_: pytest.fail("it ran"))
    with pytest.raises(RecipeError, match=words):
        hardware(**{**TWO, **other}, out=tmp_path)
    assert (tmp_path / "hardware.json").read_text() == text


@pytest.mark.survives
def test_another_machine_version_model_or_an_old_file_is_never_mixed_in(stoppable, tmp_path, monkeypatch):
    asked = {"densities": [0.5], "rows": 4, "repeats": 3, "ways": ["masked"], "out": tmp_path / "new"}
    shapes = hardware(shapes=["32x32", "32x16", "32x48", "48x32"], **asked).shapes()
    with pytest.raises(RecipeError, match="there has no model\\. Try: another folder"):
        hardware(tiny_loaded("llama"), **asked)
    hardware(tiny_loaded("llama"), **{**asked, "out": tmp_path / "model"})
    with pytest.raises(RecipeError, match=r"there has model .*'tiny-llama'.* \(asked None\)\. Try: another folder"):
        hardware(shapes=shapes, **{**asked, "out": tmp_path / "model"})
    found = Hardware.load(asked["out"])
    since = {"way_seconds", "shapes", "densities", "ways", "quick", "starts"}  # facts that older files have not
    Hardware(rows=found.rows, facts={k: v for k, v in found.facts.items() if k not in since}).save(tmp_path / "old")
    with pytest.raises(RecipeError, match="no way_seconds"):
        hardware(shapes=shapes, **{**asked, "out": tmp_path / "old"})
    versions = store.versions()
    monkeypatch.setattr(store, "versions", lambda: {**versions, "torch": "9.9"})
    monkeypatch.setattr(store, "device_name", lambda _: "another")
    with pytest.raises(RecipeError, match=r"device .* \(asked another\), versions torch .* \(asked 9\.9\)\. Try"):
        hardware(shapes=shapes, **asked)


@pytest.mark.survives
def test_a_shape_at_which_nothing_can_be_had_is_written_and_goes_on_too(stoppable, tmp_path, monkeypatch):
    def explode(case):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(WAYS, "broken", Way(explode))
    stoppable.stop, asked = 0, {**SMALL, "ways": ["broken", "2:4"], "out": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        hardware(**asked)  # at the last round, dense alone
    left = Hardware.load(tmp_path)
    assert (left.unfinished, [row["what"] for row in left.rows]) == ("1 of 2 rounds", ["broken"])
    assert "no such kernel" in str(left)
    stoppable.stop = None
    assert [row["what"] for row in hardware(**asked).rows] == ["dense", "broken", "broken", "2:4"]
    (dense,) = hardware(**{**SMALL, "ways": []}).rows
    assert (dense["what"], dense["repeats"]) == ("dense", 3)
