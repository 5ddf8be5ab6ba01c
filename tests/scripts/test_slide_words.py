"""SLIDE's problem and table: windows of words, negatives without bias, break-even, rows made once."""

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import slide_problem
    import slide_words

    return slide_problem, slide_words


def text_of(seed=0, documents=120, words=160):
    """Documents over an alphabet of 26 x 26 words, the early ones more frequent."""
    draw = random.Random(seed)
    names = [a + b for a in "abcdefghijklmnopqrstuvwxyz" for b in "abcdefghijklmnopqrstuvwxyz"]
    weights = [1 / (place + 5) for place in range(len(names))]
    return "<|endoftext|>".join(" ".join(draw.choices(names, weights, k=words)) for _ in range(documents))


@pytest.mark.matches
def test_windows_are_64_words_and_the_different_ones_among_the_next_32(scripts):
    problem, _ = scripts
    text = [f"{chr(97 + n % 7)}{chr(97 + n % 5)}" for n in range(64 + 32 + 40)]
    ids = {word: number for number, word in enumerate(dict.fromkeys(text[:100])) if number % 3}  # some are unknown
    found = problem.windows([text], ids)
    starts = range(0, 32 * ((len(text) - 64) // 32), 32)
    assert len(found.words) == len(starts)
    for start, words, labels in zip(starts, found.words.tolist(), found.labels.tolist(), strict=True):
        assert words == [ids.get(word, -1) for word in text[start : start + 64]]
        wanted = {ids[word] for word in text[start + 64 : start + 96] if word in ids}
        assert sorted(label for label in labels if label >= 0) == sorted(wanted)


@pytest.mark.matches
def test_classes_are_the_frequent_words_after_the_first_100_and_every_50th_document_is_held_out(scripts, tmp_path):
    problem, _ = scripts
    (tmp_path / "text.txt").write_text(text_of())
    found = problem.problem(tmp_path / "text.txt", None, 200, 1000)
    texts = problem.documents(tmp_path / "text.txt")
    counts = {}
    for number, text in enumerate(texts):
        for word in text if number % 50 else ():
            counts[word] = counts.get(word, 0) + 1
    kept = sorted(counts.values(), reverse=True)[100:300]
    seen = torch.bincount(found.rank, minlength=200)
    assert seen.tolist() == [1] * 200  # a place each
    assert len(found.held.words) == sum((len(text) - 64) // 32 for text in texts[::50])
    assert len(found.train.words) == sum((len(t) - 64) // 32 for n, t in enumerate(texts) if n % 50)
    assert int(found.train.words.max()) < 200
    assert kept[0] > kept[-1]  # the task has an order of frequency


@pytest.mark.matches
@pytest.mark.parametrize("arm", ["uniform", "zipf"])
def test_drawn_negatives_stand_for_all_classes_without_bias(arm, scripts):
    problem, _ = scripts
    torch.manual_seed(0)
    layer = problem.output(arm, 6, 4, torch.arange(30), 0.1, 0)
    values = torch.rand(30) + 0.1
    sums = torch.empty(4000)
    for turn in range(len(sums)):
        drawn, log_chance = layer.draw()
        assert len(drawn.unique()) == 6
        sums[turn] = (values[drawn] / log_chance.exp()).sum()
    error = (sums.mean() - values.sum()).abs() / (sums.std() / math.sqrt(len(sums)))
    assert error <= 3  # standard errors of .8 % of the sum; measured 0.8 and 0.9


@pytest.mark.matches
def test_break_even_is_found_between_neighbours_by_logarithms(scripts):
    _, words = scripts
    rows = [{"kind": "wta", "classes": n, "size": n // 100, "speedup": s} for n, s in ((1000, 0.5), (100_000, 2.0))]
    assert words.break_even(rows, "wta", "1%", 7) == 10_000
    assert words.break_even(rows[:1], "wta", "1%", 7) == "above 1000"
    assert words.break_even(rows[1:], "wta", "1%", 7) == "below 100000"


@pytest.mark.survives
def test_rows_are_made_once_and_a_second_call_goes_on(scripts, monkeypatch, tmp_path, capsys):
    _, words = scripts
    (tmp_path / "text.txt").write_text(text_of())
    small = ["--steps", 2, "--batch", 8, "--classes", 150, "--width", 8, "--sizes", 12, "--held", 6, "--seeds", 0]
    given = ["--data", tmp_path / "text.txt", "--out", tmp_path, *small]

    def call(*arms):
        monkeypatch.setattr(sys, "argv", ["slide_words.py", *map(str, given), "--only", *arms])
        words.main()
        return json.loads((tmp_path / "words.json").read_text())

    first = call("dense", "simhash")
    assert [run["arm"] for run in first["runs"]] == ["dense", "simhash"]
    assert 0 < first["runs"][1]["active_in_training"] < 150
    assert first["runs"][0]["active_in_training"] == 150
    second = call("dense", "simhash", "zipf")
    assert second["runs"][:2] == first["runs"]
    assert [row["arm"] for row in second["table"]] == ["dense", "simhash", "zipf"]
    assert "| zipf | 12 |" in capsys.readouterr().out
