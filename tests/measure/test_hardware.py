"""The result: break-even densities, advice, tables and files, from planted rows."""

import csv
import io
import json
import math

import pytest

from fewedges.errors import DataError, StoreError
from fewedges.measure.hardware import FIELDS, Hardware

FACTS = {
    "M": 256,
    "dtype": "float32",
    "device": "CPU, 1 threads",
    "itemsize": 4,
    "repeats": 30,
    "flops": 9.6e10,
    "bandwidth": 2e10,
}


def row(what, density, speedup, shape="1024x4096", **rest):
    times = {"ms_p20": 9 / speedup, "ms_p50": 10 / speedup, "ms_p80": 11 / speedup, "dense_ms_p50": 10.0}
    covers = {f"cover({b})": 1.0 for b in (16, 32, 64)}
    known = {"what": what, "shape": shape, "asked": density, "density": density, "speedup": speedup, **covers, **times}
    return {**known, "roofline": 0.25, "error": 1e-7, "peak_mib": 7.0, "M": 256, "repeats": 30, **rest}


def planted(**facts):
    rows = [row("dense", 1.0, 1.0, asked=None)]
    rows += [row("csr", d, s) for d, s in ((0.01, 8.0), (0.1, 2.0), (0.4, 0.5))]
    rows += [row("masked", d, 0.9) for d in (0.01, 0.4)]
    rows += [row("butterfly", d, s) for d, s in ((0.01, 5.0), (0.4, 2.0))]
    rows += [{"what": "2:4", "shape": "1024x4096", "asked": 0.5, "why": "needs a GPU."}]
    return Hardware(rows=rows, facts={**FACTS, **facts})


@pytest.mark.matches
def test_break_even_is_where_the_line_on_log_axes_comes_to_1():
    even = planted().break_even()["1024x4096"]
    # 2x at .1 and .5x at .4: half way on both log axes
    assert even["csr"] == [(None, pytest.approx(0.2, rel=1e-12))]
    assert even["masked"] == []
    assert even["butterfly"] == [(None, None)]  # faster wherever it was timed
    assert even["2:4"] == []
    assert "dense" not in even


@pytest.mark.says
def test_advice_names_where_each_way_starts_to_pay_and_what_never_does():
    first, last = planted().advice()
    assert "faster than dense at density: csr below 0.20 (8.0x at 0.01)" in first
    assert "butterfly at all of 0.010 to 0.40 (5.0x at 0.01)" in first
    assert "never faster: masked (0.90x at best)" in first
    assert last == "2:4 cannot be had here: needs a GPU."
    slow = Hardware(rows=[row("csr", 0.1, 0.5)], facts=FACTS).advice()
    assert slow == ["1024x4096: nothing is faster than dense; never faster: csr (0.50x at best)."]


@pytest.mark.matches
def test_advice_for_a_model_weighs_shapes_by_how_many_it_has():
    rows = [row("csr", 0.1, 4.0, shape="8x8"), row("csr", 0.1, 0.5, shape="8x16")]
    rows += [row("masked", 0.1, 0.5, shape="8x8")]  # not at the other shape: no word about the model
    model = {"name": "tiny", "counts": {"8x8": 4, "8x16": 1}}
    line = Hardware(rows=rows, facts={**FACTS, "model": model}).advice()[-3]
    # dense 5 * 10 ms; csr 4 * 2.5 + 1 * 20 = 30 ms
    assert line == "tiny, its 5 matrices at density 0.1: csr 1.67x; best csr."
    model["counts"] = {"8x8": 1, "8x16": 4}
    *_, at, whole, take = Hardware(rows=rows, facts={**FACTS, "model": model}).advice()
    assert at.endswith("csr 0.61x; dense stays fastest.")
    assert whole.endswith(
        "nothing is faster than dense; never faster: csr (0.61x at best); not for all of them: masked."
    )
    assert take == "tiny: for speed leave it dense on this device."


@pytest.mark.matches
def test_a_model_as_a_whole_has_a_way_and_a_range_of_its_own():
    """At .1 one shape is faster and the other slower: only their sum says whether the model is."""
    gains = {"8x8": {0.01: 9.0, 0.1: 4.0, 0.4: 0.8}, "8x16": {0.01: 9.0, 0.1: 0.4, 0.4: 0.2}}
    rows = [row("csr", d, gain, shape=shape) for shape, line in gains.items() for d, gain in line.items()]
    rows += [row("butterfly", d, 1.25, shape=shape) for shape in gains for d in (0.01, 0.4)]
    found = Hardware(rows=rows, facts={**FACTS, "model": {"name": "tiny", "counts": {"8x8": 3, "8x16": 1}}})
    whole = found.whole()
    # 40 ms dense; at .1 3 * 2.5 + 25 = 32.5 ms, at .4 3 * 12.5 + 50 = 87.5 ms
    speedups = [point["speedup"] for point in whole["ways"]["csr"]["points"]]
    assert speedups == pytest.approx([9.0, 40 / 32.5, 40 / 87.5])
    share = math.log(40 / 32.5) / math.log(87.5 / 32.5)
    assert whole["ways"]["csr"]["ranges"] == [(None, pytest.approx(0.1 * 4**share))]
    assert (whole["take"], whole["matrices"]) == ("butterfly", 4)
    *_, together, take = found.advice()
    assert "tiny, its 4 matrices as a whole: faster than dense at density: csr below 0.13 (9.0x at 0.01)" in together
    assert "take butterfly, which makes the whole faster at all of 0.010 to 0.40" in take
    assert take.endswith("fastest of all: csr, 9.0x at 0.01.")
    assert found.to_dict()["whole"] == whole
    assert "whole" not in planted().to_dict()


@pytest.mark.reproduces
def test_json_comes_back_equal(tmp_path):
    found = planted(model={"name": "x", "counts": {"1024x4096": 2}})
    files = found.save(tmp_path / "new" / "folder")
    assert [path.name for path in files] == ["hardware.json", "hardware.csv"]
    for path in (files[0], files[0].parent):
        assert Hardware.load(path) == found
    saved = json.loads(files[0].read_text())
    assert saved["break_even"]["1024x4096"]["csr"] == [[None, pytest.approx(0.2)]]
    assert saved["whole"]["ways"]["csr"]["pays"] == "below 0.20"


@pytest.mark.says
def test_the_csv_starts_with_the_columns_of_every_benchmark_here():
    text = planted().csv()
    lines = list(csv.DictReader(io.StringIO(text)))
    start = "what,shape,dtype,device,torch,ms_p20,ms_p50,ms_p80,peak_mib,"
    assert text.startswith(start)
    assert list(lines[0]) == FIELDS
    assert [(line["what"], line["ms_p50"]) for line in lines[:2]] == [("dense", "10"), ("csr", "1.25")]
    assert (lines[-1]["why"], lines[-1]["ms_p50"]) == ("needs a GPU.", "")


@pytest.mark.survives
@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "{}", '{"rows": [{}], "facts": {}}', '{"rows": [1], "facts": {}}', '{"rows": [], "facts": []}'),
        *(f'{{"rows": [], "facts": {{"unfinished": {text}}}}}' for text in ('{"of": 2}', '{"of": 2, "rounds": [{}]}')),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused(tmp_path, text):
    (tmp_path / "hardware.json").write_text(text)
    with pytest.raises(DataError, match=r"Hardware\.save"):
        Hardware.load(tmp_path)


@pytest.mark.survives
def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError):
        Hardware.load(tmp_path / "nothing.json")


@pytest.mark.says
def test_tables_show_every_row_and_reasons():
    (header, rows), refused, (shapes, lines) = planted().tables()
    assert header[:4] == ["1024x4096", "density", "cover(32)", "ms"]
    assert len(rows) == 8
    assert all(len(cells) == len(header) for cells in rows)
    assert rows[1] == ["csr", "0.0100", "1.000", "1.25", "1.12-1.38", "8.00", "25.0%", "1e-07", "7.0"]
    assert refused == (["not timed", "where", "why"], [["2:4", "everywhere", "needs a GPU."]])
    assert shapes == ["pays at density", "1024x4096"]
    assert lines == [["csr", "below 0.20"], ["masked", "never"], ["butterfly", "at all of 0.010 to 0.40"]]
    assert len(Hardware(rows=planted().rows[:-1], facts=FACTS).tables()) == 2


@pytest.mark.says
def test_a_reason_that_holds_at_some_densities_says_at_which():
    why = {"why": "no plan", "what": "csr", "shape": "8x8", "asked": 0.01}
    refused = Hardware(rows=[row("csr", 0.1, 2.0, shape="8x8"), why], facts=FACTS).tables()[1]
    assert refused[1] == [["csr", "8x8 at 0.01", "no plan"]]


@pytest.mark.survives
def test_a_file_from_before_runs_could_be_resumed_still_loads(tmp_path):
    planted().save(tmp_path)
    found = Hardware.load(tmp_path)
    assert not {"unfinished", "starts", "way_seconds"} & set(found.facts)
    assert (found.unfinished, found.shapes()) == ("", ["1024x4096"])
    assert "median of 30 runs, ways" in found.protocol()


@pytest.mark.survives
def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="can be written"):
        planted().save(tmp_path / "file")


@pytest.mark.says
def test_a_run_that_was_stopped_says_so_and_nothing_of_the_model_as_a_whole():
    rounds = [{"shape": "1024x4096", "density": 0.1, "dense_ms": [10.0, 11.0]}]
    model = {"name": "tiny", "counts": {"1024x4096": 2, "8x8": 2}}
    found = planted(unfinished={"of": 12, "rounds": rounds}, model=model)
    assert found.unfinished == "1 of 12 rounds"
    assert found.advice()[0] == "Unfinished: 1 of 12 rounds were timed."
    assert found.protocol().endswith("Unfinished: 1 of 12 rounds.")
    assert found.whole() is None
    assert not [line for line in found.advice() if line.startswith("tiny")]
    assert "nfinished" not in str(planted())


@pytest.mark.says
def test_the_protocol_names_the_ways_that_had_fewer_repeats():
    rows = [row("dense", 1.0, 1.0, repeats=12), row("bsr 32", 0.5, 0.1, repeats=9), row("masked", 0.5, 0.9)]
    rows += [row("csr", d, 0.1, repeats=n) for d, n in ((0.1, 12), (0.2, 30), (0.5, 5))]
    said = Hardware(rows=rows, facts=FACTS).protocol()
    assert "median of 30 runs (slow ways fewer: bsr 32 9, csr 5 to 12), ways and dense interleaved" in said


@pytest.mark.says
def test_it_shows_itself_in_a_notebook_and_says_how_it_was_measured():
    found = planted()
    page = found._repr_html_()
    assert page.count("<tr>") == 9 + 2 + 4
    assert "csr below 0.20" in page
    assert "median of 30 runs" in str(found)
    assert "96 GFLOP/s and 20 GB/s" in str(found)
    assert "wall time" in found.protocol()
    assert "CPU time of the one thread" in planted(clock="thread").protocol()
    assert "replayed as CUDA graphs" in planted(clock="graph").protocol()
