import re

import pytest

from fewedges.errors import DataError
from fewedges.explain.tasks import docstring


def parts(text):
    """Method, arguments and documented names of a prompt, by reading it."""
    method, arguments = re.search(r"def (\w+)\(self, (.*)\):", text).groups()
    return method, arguments.split(", "), re.findall(r"[:@]param (\w+):", text)


@pytest.mark.matches
def test_the_published_layout_is_written_as_published():
    layout = docstring.LAYOUTS[0]
    text = docstring.function(
        layout, [["p", "q"], ["s"]], ["A", "B", "C"], ["A", "B"], "run", ["u", "v", "w", "a", "b", "c", "d"]
    )
    expected = '\ndef run(self, p, q, A, B, C, s):\n    """u v w\n\n    :param A: a b\n    :param B: c d\n    :param'
    assert text == expected


@pytest.mark.stays
def test_the_answer_is_the_next_argument_and_all_others_are_wrong(tok):
    prompts = docstring.generate(tok, 60)
    for (clean, corrupt), (answer,), wrong, number in zip(
        prompts.texts, prompts.answers, prompts.wrong, prompts.template, strict=True
    ):
        layout = docstring.LAYOUTS[number]
        method, arguments, documented = parts(clean)
        place = layout.before
        assert arguments[place : place + 2] == documented
        assert tok.convert_ids_to_tokens(answer) == arguments[place + 2]
        other_method, others, other_documented = parts(corrupt)
        everyone = {*arguments, *others, *documented, *other_documented} - {arguments[place + 2]}
        assert {*map(tok.convert_ids_to_tokens, wrong)} == everyone
        assert len(arguments) == layout.before + 3 + layout.after
        assert clean.endswith(f"\n    {layout.marker}")
        assert method == other_method


@pytest.mark.stays
def test_the_corrupt_prompt_has_new_names_where_it_matters_and_the_old_ones_around(tok):
    for (clean, corrupt), number in zip(*(lambda p: (p.texts, p.template))(docstring.generate(tok, 60)), strict=True):
        layout = docstring.LAYOUTS[number]
        (_, before, documented), (_, after, other) = parts(clean), parts(corrupt)
        middle = slice(layout.before, layout.before + 3)
        assert len({*before[middle], *after[middle], *documented, *other}) == 3 + 3 + 2
        assert before[: layout.before] == after[: layout.before]
        assert before[middle.stop :] == after[middle.stop :]
        names = "|".join(sorted({*before, *after, *other}, key=len, reverse=True))
        assert re.sub(rf"\b({names})\b", "X", clean) == re.sub(rf"\b({names})\b", "X", corrupt)


@pytest.mark.matches
def test_tokens_have_the_roles_of_their_arguments(tok):
    prompts = docstring.generate(tok, 60)
    for row, places in enumerate(prompts.places):
        said = [tok.convert_ids_to_tokens(token) for token in prompts.clean[row, : len(places)].tolist()]
        word = dict(zip(places, said, strict=True))
        _, arguments, documented = parts(prompts.texts[row][0])
        before = docstring.LAYOUTS[prompts.template[row]].before
        assert [word["A"], word["B"], word["C"]] == arguments[before : before + 3]
        assert [word["A doc"], word["B doc"]] == documented
        assert sorted(filter(None, prompts.roles[row])) == ["A", "A doc", "B", "B doc", "C"]
        assert word["END"] == "param"


@pytest.mark.stays
def test_layouts_are_templates(tok):
    prompts = docstring.generate(tok, 24)
    assert set(prompts.template) == set(range(6))
    assert prompts.metric == "max_diff"
    assert prompts.chance == pytest.approx(sum(1 / (1 + len(w)) for w in prompts.wrong) / 24)
    assert set(docstring.generate(tok, 8, layouts=[0]).template) == {0}
    first, second = prompts.split()
    assert len(set(first.template)) == len(set(second.template)) == 3


@pytest.mark.survives
@pytest.mark.parametrize("layouts", [[], [6], [0, -1]])
def test_a_layout_there_is_not_is_refused(tok, layouts):
    with pytest.raises(DataError, match="some of 0 to 5"):
        docstring.generate(tok, 4, layouts=layouts)


@pytest.mark.survives
def test_a_tokenizer_without_the_names_is_refused(words):
    with pytest.raises(DataError, match=r"docstring: .* words are one token"):
        docstring.generate(words(without=docstring.ARGUMENTS), 4)


@pytest.mark.reproduces
def test_a_seed_is_a_set_of_prompts(tok):
    assert docstring.generate(tok, 20, 1).texts == docstring.generate(tok, 20, 1).texts
    assert docstring.generate(tok, 20, 1).texts != docstring.generate(tok, 20, 2).texts
