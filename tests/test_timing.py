"""The verb `hardware`: what it writes. Times are planted."""

import json

import pytest

from fewedges.measure import speed
from fewedges.timing import hardware


@pytest.fixture
def planted(monkeypatch):
    def interleaved(runs, device, repeats=30, **_):
        return {name: [10.0 if name == "dense" else 4.0] * repeats for name in runs}

    monkeypatch.setattr(speed, "interleaved", interleaved)
    monkeypatch.setattr(speed, "peaks", lambda *_: {"flops": 1e9, "bandwidth": 1e9})


@pytest.mark.says
def test_out_holds_the_table_and_both_pictures(planted, tmp_path, capsys):
    asked = {"shapes": ("64x128",), "densities": (0.5,), "rows": 4, "repeats": 3, "ways": ("masked", "monarch")}
    hardware(**asked, theme="dark", out=tmp_path)
    said = capsys.readouterr().out
    names = ["hardware.json", "hardware.csv"]
    names += [f"hardware-{part}dark.{kind}" for part in ("", "blocks-") for kind in ("svg", "png")]
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    assert all(str(tmp_path / name) in said for name in names)
    saved = json.loads((tmp_path / "hardware.json").read_text())
    assert saved["break_even"] == {"64x128": {"masked": [[None, None]], "monarch": [[None, None]]}}
    assert "1 weight kept," in (tmp_path / "hardware-blocks-dark.svg").read_text()
