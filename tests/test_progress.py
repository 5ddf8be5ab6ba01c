"""Tables as they are read: whole in a pipe, and on a terminal of any width with every number in one piece."""

import re

import pytest

from fewedges.measure.ledger import Ledger
from fewedges.progress import print_table

NUMBERS = ["331,776", "165,888", "0.5017", "0.901", "0.902", "1.000", "1,327,104"]


def found(name="model.layers.11.self_attn.q_proj"):
    row = {"name": name, "shape": (576, 576), "parameters": 331_776, "nnz": 165_888, "density": 0.5017}
    row |= {"cover(16)": 0.901, "cover(32)": 0.902, "cover(64)": 1.0, "flops": 331_776, "bytes": 1_327_104}
    models = {"sparse": {"cross_entropy": 3.1416, "bytes": 806_144_512, "model_bytes": None}}
    return Ledger(matrices=[row], models=models, facts={"made": "addition: prune"})


class Sentences:
    def tables(self):
        return [(["not timed", "where", "why"], [["csr", "everywhere", "this device " + "cannot do so " * 9]])]

    def protocol(self):
        return "protocol"


def shown(monkeypatch, capsys, width, report):
    """What a terminal of this width is given."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_table(report)
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)


@pytest.mark.stays
def test_in_a_pipe_a_table_is_the_whole_markdown(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    print_table(found())
    assert capsys.readouterr().out == found().markdown() + "\n"


@pytest.mark.stays
@pytest.mark.parametrize("width", [12, 30, 60, 80, 100, 119, 200])
def test_no_number_is_cut_on_a_terminal_of_any_width(monkeypatch, capsys, width):
    text = shown(monkeypatch, capsys, width, found())
    words = re.split(r"[\s│┃]+", text)
    for number in [*NUMBERS, "576x576", "3.1416", "806,144,512", "unknown"]:
        assert number in words, (width, number)
    assert "…" not in text
    header = "".join(line for line in text.splitlines() if "┃" in line)
    assert all(word in header for word in ("parameters", "cover(64)", "bytes", "density"))
    if width >= 40:
        assert max(map(len, text.splitlines())) <= width


@pytest.mark.stays
def test_names_are_folded_not_cut_and_stand_beside_every_part(monkeypatch, capsys):
    text = shown(monkeypatch, capsys, 80, found())
    first = ["".join(re.findall(r"^│ (\S*)", text[at:], re.M)) for at in [m.start() for m in re.finditer("┏", text)]]
    assert first[0].count("model.layers.11.self_attn.q_proj") == 2  # nine columns in two parts
    wide = shown(monkeypatch, capsys, 200, found())
    assert "│ model.layers.11.self_attn.q_proj │" in wide


@pytest.mark.stays
def test_a_sentence_is_broken_at_blanks_and_the_table_stays_as_wide_as_the_terminal(monkeypatch, capsys):
    text = shown(monkeypatch, capsys, 60, Sentences())
    assert max(map(len, text.splitlines())) <= 60
    assert "everywhere" in text
    assert text.count("cannot") == 9
