import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from fewedges.draw import THEMES, save
from fewedges.draw.circuit import CircuitPicture, circuits, line, lines_of, place_of, used_nodes
from fewedges.errors import DataError
from fewedges.explain.graph import Graph

EDGES = ("input->a0.h1<q>", "input->m0", "a0.h1->a2.h3<v>", "a0.h1->m0", "m0->m2", "a2.h3->logits", "m2->logits")


def picture(edges=EDGES, title="Sparse tiny", layers=3, heads=4, **rest):
    return CircuitPicture(title=title, layers=layers, heads=heads, edges=edges, **rest)


def artist(figure, name):
    (found,) = figure.findobj(lambda artist: artist.get_gid() == name)
    return found


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts] + [x.get_text() for x in figure.texts]


@pytest.mark.matches
def test_a_line_runs_from_the_writer_to_the_input_of_the_reader():
    lines = lines_of(picture(), radius=0.1)
    ends = [(tuple(path[0].round(6)), tuple(path[-1].round(6))) for path in lines]
    head = {(layer, number): (float(number), layer + 1.0) for layer in range(3) for number in range(4)}
    bottom, top, mlp = (1.5, 0.0), (1.5, 4.0), {layer: (4.35, layer + 1.42) for layer in range(3)}
    assert ends == [
        (bottom, (0.9, 1.0)),  # the query is left
        (bottom, mlp[0]),
        (head[0, 1], (3.1, 3.0)),  # the value is right
        (head[0, 1], mlp[0]),
        (mlp[0], mlp[2]),
        (head[2, 3], top),
        (mlp[2], top),
    ]


@pytest.mark.matches
def test_used_components_are_outlined_and_the_others_grey():
    figure = circuits([picture(nodes=["a1.h0"])])
    used = {(0, 1), (2, 3), (1, 0)}
    places = {(float(x), float(y)) for x, y in artist(figure, "head-used-0").get_offsets()}
    assert places == {(float(head), layer + 1.0) for layer, head in used}
    assert len(artist(figure, "head-unused-0").get_offsets()) == 12 - 3
    assert artist(figure, "mlp-used-0").get_offsets()[:, 1].tolist() == [1.42, 3.42]
    assert artist(figure, "mlp-unused-0").get_offsets()[:, 1].tolist() == [2.42]
    light = THEMES["light"]
    assert to_hex(artist(figure, "head-used-0").get_edgecolor()[0]) == light.ink
    assert to_hex(artist(figure, "head-unused-0").get_facecolor()[0]) == light.closed


@pytest.mark.matches
def test_what_a_group_of_heads_reads_ends_at_those_of_them_that_are_used():
    edges = ["m0->a1.g1<k>", "a1.h2->logits"]
    grouped = picture(edges, key_readers=2)
    assert [path[-1].tolist() for path in lines_of(grouped)] == [[2.0, 2.0], [1.5, 4.0]]
    both = picture([*edges, "a1.h3->logits"], key_readers=2)
    assert [path[-1].tolist() for path in lines_of(both)[:2]] == [[2.0, 2.0], [3.0, 2.0]]
    alone = picture(edges[:1], key_readers=2)
    assert lines_of(alone)[0][-1].tolist() == [2.5, 2.0]  # between the two
    assert used_nodes(alone) == {place_of(alone, "m0")}


@pytest.mark.stays
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("key_readers", [1, 2, 4])
def test_every_edge_of_a_graph_can_be_drawn(split, key_readers):
    graph = Graph(layers=3, heads=4, key_readers=key_readers if split else 4, split=split)
    whole = picture(graph.names(graph.real), key_readers=graph.key_readers)
    assert len(whole.edges) == graph.edges
    assert len(used_nodes(whole)) == graph.sources + 1
    paths = lines_of(whole)
    assert len(paths) >= graph.edges
    assert all(path[-1][1] > path[0][1] for path in paths)


@pytest.mark.stays
@given(st.integers(0, 20), st.integers(2, 11), st.booleans())
def test_a_line_within_a_column_is_an_arc_around_what_lies_between(start, up, mlp):
    lift = 1.42 if mlp else 1.0
    path = line((2.0, start + lift), (2.0, start + up + lift), 32)
    assert (path[0].tolist(), path[-1].tolist()) == ([2.0, start + lift], [2.0, start + up + lift])
    assert np.all(np.diff(path[:, 1]) > 0)
    assert 2.1 < path[:, 0].max() <= 2.6
    assert np.all(path[:, 0] >= 2.0)


@pytest.mark.stays
def test_other_lines_are_straight():
    for path in (line((0.0, 1.0), (3.0, 5.0), 8), line((2.0, 1.0), (2.0, 2.0), 8), line((2.0, 0.0), (2.0, 5.0), 8)):
        assert len(path) == 2


@pytest.mark.stays
@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (4, 4), (12, 12), (32, 32)])
def test_two_models_have_one_scale(layers, heads):
    pair = [picture(["input->logits"], title, layers, heads) for title in ("Sparse x", "x (baseline)")]
    figure = circuits(pair)
    one, other = figure.axes
    assert (one.get_xlim(), one.get_ylim()) == (other.get_xlim(), other.get_ylim())
    assert one.get_position().size == pytest.approx(other.get_position().size)
    assert one.get_position().y0 == other.get_position().y0


@pytest.mark.stays
@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (4, 4), (30, 9), (40, 40)])
def test_no_text_is_cut_off(outside, layers, heads):
    pair = [
        picture(EDGES if layers > 2 and heads > 3 else ["input->m0"], t, layers, heads)
        for t in ("Sparse", "B (baseline)")
    ]
    assert outside(circuits(pair, title="IOI")) == []


@pytest.mark.stays
def test_many_edges_are_fainter_alike_in_all_panels_and_more_than_a_few_thousand_an_image():
    graph = Graph(layers=8, heads=8, key_readers=8)
    names = graph.names(graph.real)
    assert len(names) > 4_000
    shown = [picture(some, layers=8, heads=8) for some in (names[:20], names[:500], names)]
    figure = circuits(shown)
    lines = [artist(figure, f"circuit-edges-{index}") for index in range(3)]
    assert [bool(one.get_rasterized()) for one in lines] == [False, False, True]
    assert len({one.get_alpha() for one in lines}) == 1  # ink compares between panels
    alone = [artist(circuits([one]), "circuit-edges-0").get_alpha() for one in shown]
    assert alone[0] > lines[0].get_alpha() > alone[2]
    assert alone[0] > alone[1] > alone[2]


@pytest.mark.reproduces
def test_same_circuit_same_bytes(tmp_path):
    first, second = (save(circuits([picture()]), tmp_path / name) for name in "ab")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.survives
@pytest.mark.parametrize(
    ("edge", "message"),
    [
        ("a0.h4->logits", "no component 'a0.h4'"),
        ("a3.h0->logits", "no component 'a3.h0'"),
        ("m3->logits", "no component 'm3'"),
        ("input->a1.g2<k>", "no component 'a1.g2<k>'"),
        ("input->a1.h2<o>", "no component"),
        ("resid->logits", "no component 'resid'"),
        ("a1.h0->a1.h1<q>", "does not run upward"),
        ("m1->a1.h1", "does not run upward"),
        ("logits->input", "does not run upward"),
        ("input", "does not run upward|no component ''"),
    ],
)
def test_an_edge_that_the_model_does_not_have_is_refused(edge, message):
    with pytest.raises(DataError, match=message):
        picture([edge], key_readers=2)


@pytest.mark.survives
def test_models_of_different_shapes_and_strange_numbers_are_refused():
    with pytest.raises(DataError, match="models of one shape"):
        circuits([picture(), picture(["input->m0"], layers=2)])
    with pytest.raises(DataError, match="no circuit"):
        circuits([])
    with pytest.raises(DataError, match="heads a multiple of groups"):
        picture([], key_readers=3)
    with pytest.raises(DataError, match=r"no component 'a9\.h0'"):
        picture([], nodes=["a9.h0"])


@pytest.mark.survives
def test_an_empty_circuit_is_drawn_grey(tmp_path):
    figure = circuits([picture([])])
    assert len(artist(figure, "head-unused-0").get_offsets()) == 12
    assert "0 circuit edges" in texts(figure)
    save(figure, tmp_path / "empty")


@pytest.mark.says
def test_counts_layers_and_kinds_are_written():
    figure = circuits([picture(caption="0.9 of the effect"), picture(["input->m0"], "Tiny (baseline)")], title="IOI")
    for text in ("Sparse tiny", "Tiny (baseline)", "7 circuit edges", "1 circuit edge", "0.9 of the effect", "IOI"):
        assert text in texts(figure)
    for text in ("Layers", "input", "logits", "head", "MLP", "unused", "0", "2"):
        assert text in texts(figure)
