import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from fewedges.draw import THEMES, Panel, connectivity, save, training_curve
from fewedges.draw.text import text_width, visible, wrap
from fewedges.draw.theme import styled
from fewedges.errors import DataError, RecipeError

LOG = [{"step": step, "kl": 0.1, "multiplier": 0.1 * (1 + step)} for step in range(9)]


def luminance(colour):
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(one, other):
    """The contrast ratio of WCAG 2, from 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.matches
def test_contrast_of_black_and_white_is_21():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


@pytest.mark.stays
@pytest.mark.parametrize("theme", THEMES.values(), ids=list(THEMES))
def test_text_and_lines_can_be_read(theme):
    assert contrast(theme.ink, theme.paper) > 12
    assert contrast(theme.muted, theme.paper) > 5
    assert all(contrast(colour, theme.paper) > 3 for colour in theme.series)
    assert contrast(theme.closed, theme.void) > 1.3


@pytest.mark.stays
@pytest.mark.parametrize("theme", THEMES.values(), ids=list(THEMES))
def test_more_weight_is_more_contrast_even_in_grey(theme):
    shades = [contrast(colour[:3], theme.paper) for colour in theme.weight_colours(np.linspace(0, 1, 50))]
    assert np.all(np.diff(shades) > 0)
    assert shades[0] > 1.5
    assert shades[-1] > 12


@pytest.mark.stays
def test_settings_are_put_back(pair):
    before = dict(matplotlib.rcParams)
    connectivity(pair, theme="dark")
    with pytest.raises(ZeroDivisionError), styled("dark"):
        raise ZeroDivisionError
    assert dict(matplotlib.rcParams) == before


@pytest.mark.stays
def test_a_theme_fills_the_background(tmp_path):
    for theme in THEMES.values():
        _, path = save(training_curve(LOG, theme=theme.name), tmp_path / theme.name)
        corner = imread(path)[0, 0]
        np.testing.assert_allclose(corner[:3], to_rgb(theme.paper), atol=1 / 255)
        assert corner[3:].tolist() in ([], [1.0])


@pytest.mark.stays
@pytest.mark.parametrize("theme", THEMES.values(), ids=list(THEMES))
def test_late_born_ticks_wear_the_theme(tmp_path, theme):
    figure = training_curve(LOG, theme=theme.name)
    save(figure, tmp_path / "curve", "svg")
    both = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    ticks = [tick for axis in both for tick in axis.get_major_ticks()]
    assert len(ticks) > 10
    assert {(tick.label1.get_color(), tick.label1.get_fontsize()) for tick in ticks} == {(theme.ink, 7.0)}
    assert {tick.tick1line.get_color() for tick in ticks} == {theme.muted}


@pytest.mark.reproduces
def test_what_the_user_has_set_stays_out_of_the_picture(tmp_path):
    plain = save(training_curve(LOG), tmp_path / "plain")
    hostile = {"font.size": 30, "xtick.color": "red", "svg.fonttype": "path", "savefig.transparent": True}
    hostile |= {"savefig.bbox": "tight", "lines.linewidth": 9, "svg.hashsalt": None}
    with matplotlib.rc_context(hostile):
        other = save(training_curve(LOG), tmp_path / "other")
    for one, two in zip(plain, other, strict=True):
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.reproduces
def test_another_process_writes_the_same_bytes(tmp_path):
    code = (
        "import sys; from fewedges.draw import save, training_curve\n"
        "log = [{'step': s, 'kl': 0.1, 'multiplier': 0.1 * (1 + s)} for s in range(9)]\n"
        "save(training_curve(log), sys.argv[1], ['svg', 'png', 'pdf'])\n"
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules, 'imported too much'"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, tmp_path / "far"], check=True)
    for near in save(training_curve(LOG), tmp_path / "near", ["svg", "png", "pdf"]):
        assert near.read_bytes() == (tmp_path / f"far{near.suffix}").read_bytes()


@pytest.mark.says
def test_an_svg_holds_text_and_no_date(tmp_path):
    (path,) = save(training_curve(LOG, title="a run"), tmp_path / "curve", ["svg"])
    svg = path.read_text()
    assert ">a run</text>" in svg
    assert "dc:date" not in svg


@pytest.mark.stays
def test_save_makes_folders_and_keeps_dots_in_names(tmp_path):
    paths = save(training_curve(LOG), tmp_path / "runs" / "v1.5", ("png", "svg"))
    assert paths == [tmp_path / "runs" / "v1.5.png", tmp_path / "runs" / "v1.5.svg"]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["v1.5.png", "v1.5.svg"]


@pytest.mark.survives
def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    (path,) = save(training_curve(LOG), tmp_path / "curve", "svg")
    before = path.read_bytes()

    def fail(self, target, **_):
        target.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        save(training_curve(LOG), tmp_path / "curve", "svg")
    assert [item.read_bytes() for item in tmp_path.iterdir()] == [before]


@pytest.mark.survives
@pytest.mark.parametrize("formats", [["gif"], [], ["svg", "bmp"]])
def test_unknown_formats_are_refused_before_writing(tmp_path, formats):
    with pytest.raises(RecipeError, match="svg, png or pdf"):
        save(training_curve(LOG), tmp_path / "curve", formats)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.survives
def test_an_unknown_theme_is_refused():
    with pytest.raises(RecipeError, match="light, dark"):
        training_curve(LOG, theme="sepia")


GOOD = np.zeros((2, 3, 4, 4))
OPEN = np.broadcast_to(np.eye(4, dtype=bool), GOOD.shape)


@pytest.mark.survives
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": "abc"}, "for 3 tokens"),
        ({"weights": GOOD[0]}, r"\(3, 4, 4\)"),
        ({"weights": GOOD[:0], "open": OPEN[:0]}, "none of them 0"),
        ({"weights": GOOD[..., :3]}, r"\(2, 3, 4, 3\)"),
        ({"open": OPEN[:1]}, "the same shape for both"),
        ({"open": OPEN.astype(float)}, "dtype float64"),
        ({"open": ~OPEN}, "key comes after its query"),
        ({"tokens": [1, 2, 3, 4]}, "no text: 1"),
        ({"weights": GOOD + 1.5}, "from 1.5 to 1.5"),
        ({"weights": GOOD - 0.5}, "from -0.5 to -0.5"),
        ({"weights": GOOD * np.nan}, "nan"),
        ({"weights": GOOD + 0.5}, "closed gate"),
    ],
)
def test_a_panel_that_contradicts_itself_is_refused(change, message):
    sound = {"title": "sparse", "tokens": list("abcd"), "weights": GOOD, "open": OPEN}
    assert Panel(**sound).edges == 24
    with pytest.raises(DataError, match=message):
        Panel(**{**sound, **change})


@pytest.mark.matches
@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" the", "␣the"),
        ("\n", "⏎"),
        ("\t\r", "⇥↵"),
        ("", "∅"),
        ("a\x00漢", "a▯▯"),
        ("x" * 13, "x" * 11 + "…"),
    ],
)
def test_tokens_are_made_visible(token, shown):
    assert visible(token) == shown


@pytest.mark.stays
def test_wrapped_lines_fit_and_keep_every_word():
    text = "5.50 edges per query per head, T = 10"
    lines = wrap(text, 1.0, 7)
    assert len(lines) > 1
    assert " ".join(lines) == text
    assert max(text_width(line, 7) for line in lines) <= 1.0
    assert wrap("", 1.0, 7) == []
    assert wrap("unbreakable" * 5, 0.5, 7) == ["unbreakable" * 5]
