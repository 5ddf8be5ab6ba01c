"""Texts put into one file are read as the same documents, as often as was asked."""

import lzma
import runpy
import sys
from pathlib import Path

import pytest

from fewedges.data.text import _documents

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "mix_data.py"
ONE = "A first document.\n\nWith two paragraphs; ein Umlaut: ü.\n<|endoftext|>\nA second one.\n<|endoftext|>\n"
TWO = "\n\nNo line ends this one"


def mix(monkeypatch, out, *files):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, files), "--out", str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return [document.strip() for document in _documents(out)]


@pytest.mark.reproduces
def test_documents_come_back_from_plain_and_packed_files_as_often_as_asked(tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text(ONE, encoding="utf-8")
    (tmp_path / "two.txt.xz").write_bytes(lzma.compress(TWO.encode()))
    one = [document.strip() for document in _documents(tmp_path / "one.txt")]
    two = [document.strip() for document in _documents(tmp_path / "two.txt.xz")]
    assert (len(one), two) == (2, [TWO.strip()])
    files = (tmp_path / "one.txt", f"{tmp_path / 'two.txt.xz'}:3")
    assert mix(monkeypatch, tmp_path / "mixed.txt", *files) == one + 3 * two
    assert mix(monkeypatch, tmp_path / "again.txt", tmp_path / "mixed.txt") == one + 3 * two


@pytest.mark.survives
def test_a_missing_file_or_a_count_that_is_none_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "one.txt").write_text(ONE, encoding="utf-8")
    with pytest.raises(FileNotFoundError):
        mix(monkeypatch, tmp_path / "mixed.txt", tmp_path / "none.txt")
    with pytest.raises(ValueError, match="many"):
        mix(monkeypatch, tmp_path / "mixed.txt", f"{tmp_path / 'one.txt'}:many")
