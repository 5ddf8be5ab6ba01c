"""The verb `hardware`: what it writes. Times are planted."""

import json

import pytest

from fewedges.errors import Interrupted
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


@pytest.mark.survives
def test_control_c_keeps_the_rounds_done_and_the_same_command_goes_on(planted, tmp_path, monkeypatch, capsys):
    asked = {"shapes": ("64x128",), "densities": (0.1, 0.5), "rows": 4, "repeats": 3, "ways": ("masked",)}
    timed, again = speed.interleaved, []

    def stopped(runs, *rest, **more):
        again.append(runs)
        if len(again) == 2:
            raise KeyboardInterrupt
        return timed(runs, *rest, **more)

    monkeypatch.setattr(speed, "interleaved", stopped)
    with pytest.raises(Interrupted, match=r"1 of 2 rounds are in .*the same command again") as caught:
        hardware(**asked, out=tmp_path)
    assert caught.value.code == 130
    hardware(**asked, out=tmp_path)
    said = capsys.readouterr()
    assert "1 of 2 rounds done before" in said.err
    assert "Unfinished" not in said.out
    assert (len(again), len(list(tmp_path.iterdir()))) == (3, 6)
    (tmp_path / "hardware-light.svg").unlink()
    hardware(**asked, out=tmp_path)  # finished: only drawn again
    assert "all rounds done before" in capsys.readouterr().err
    assert (len(again), len(list(tmp_path.iterdir()))) == (3, 6)


@pytest.mark.survives
def test_control_c_with_nothing_written_is_control_c(planted, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "interleaved", stopped)
    with pytest.raises(KeyboardInterrupt) as caught:
        hardware(shapes=("64x128",), densities=(0.5,), rows=4, repeats=3, ways=("masked",))
    assert not isinstance(caught.value, Interrupted)
