import re
import string

import pytest
import torch

from fewedges.errors import DataError
from fewedges.explain.tasks import ioi, ioi_long


def names_in(text):
    return [word for word in re.findall(r"\w+", text) if word in ioi.NAMES]


def decoded(tok, ids):
    return [tok.convert_ids_to_tokens(one[0]) for one in ids]


@pytest.mark.stays
def test_names_are_said_as_the_task_wants_it(tok):
    prompts = ioi.generate(tok, 60)
    for (clean, _), answer, wrong in zip(
        prompts.texts, decoded(tok, prompts.answers), decoded(tok, prompts.wrong), strict=True
    ):
        first, second, again = names_in(clean)
        assert again == wrong
        assert {first, second} == {answer, wrong}
        assert answer != wrong


@pytest.mark.stays
@pytest.mark.parametrize("corruption", ioi.CORRUPTIONS)
def test_a_corruption_changes_the_names_it_says_and_nothing_else(tok, corruption):
    prompts = ioi.generate(tok, 60, corruption=corruption)
    for row, (clean, corrupt) in enumerate(prompts.texts):
        before, after = names_in(clean), names_in(corrupt)
        if corruption == "abc":
            assert len({*before, *after}) == 5
        else:
            assert before[:2] == after[:2]
            assert after[2] not in before[2:]
            assert (after[2] in before) == (corruption == "s2_io_flip")
        assert re.sub("|".join(before), "X", clean) == re.sub("|".join({*before, *after}), "X", corrupt)
        changed = (prompts.clean[row] != prompts.corrupt[row]).sum().item()
        assert changed == (3 if corruption == "abc" else 1)
    assert prompts.metric == "logit_diff"


@pytest.mark.stays
def test_both_orders_of_all_templates_come_in_turn(tok):
    prompts = ioi.generate(tok, 30)
    orders = [names_in(clean)[0] == names_in(clean)[2] for clean, _ in prompts.texts]
    seen = set(zip(prompts.template, orders, strict=True))
    assert seen == {(template, first) for template in range(15) for first in (True, False)}
    for order, subject_first in (("baba", True), ("abba", False)):
        texts = ioi.generate(tok, 20, order=order).texts
        assert {names_in(clean)[0] == names_in(clean)[2] for clean, _ in texts} == {subject_first}


@pytest.mark.stays
def test_templates_and_words_are_whole():
    assert len(set(ioi.TEMPLATES)) == 15
    for template in ioi.TEMPLATES:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name]
        assert sorted(fields) == ["a", "b", "place", "s", "thing"]
        assert template.index("{a}") < template.index("{b}") < template.index("{s}")
        assert template.endswith(" to")
    for words in (ioi.NAMES, ioi.PLACES, ioi.THINGS, ioi_long.LEAD_INS):
        assert len(set(words)) == len(words)


@pytest.mark.stays
def test_a_name_that_is_no_token_is_never_said(words):
    tokenizer = words(without=ioi.NAMES[12:])
    said = {name for texts in ioi.generate(tokenizer, 60).texts for text in texts for name in names_in(text)}
    assert said <= set(ioi.NAMES[:12])
    assert len(said) == 12


@pytest.mark.matches
@pytest.mark.parametrize("generate", [ioi.generate, ioi_long.generate])
def test_tokens_have_the_roles_of_their_words(tok, generate):
    prompts = generate(tok, 60)
    for row, roles in enumerate(prompts.roles):
        said = [tok.convert_ids_to_tokens(token) for token in prompts.clean[row, : len(roles)].tolist()]
        word = {role: said[place] for place, role in enumerate(roles) if role}
        assert sorted(word) == ["IO", "S1", "S2", "place", "thing"]
        assert [word["IO"], word["S1"], word["S2"]] == decoded(tok, [prompts.answers[row]]) + 2 * decoded(
            tok, [prompts.wrong[row]]
        )
        assert roles.index("S2") > max(roles.index("S1"), roles.index("IO"))
        assert word["place"] in ioi.PLACES
        assert word["thing"] in ioi.THINGS
        assert prompts.places[row][-1] == "END"


@pytest.mark.survives
def test_too_few_names_or_an_unknown_option_is_refused(tok, words):
    with pytest.raises(DataError, match=r"ioi \(abc\): 9 of \d+ words are one token"):
        ioi.generate(words(without=ioi.NAMES[9:]), 4)
    with pytest.raises(DataError, match="one of abc, third_name, s2_io_flip"):
        ioi.generate(tok, 4, corruption="cba")
    with pytest.raises(DataError, match="one of both, baba, abba"):
        ioi_long.generate(tok, 4, order="aabb")
    with pytest.raises(DataError, match=r"clauses 13\. Try: 0 to 12"):
        ioi_long.generate(tok, 4, clauses=13)


@pytest.mark.reproduces
@pytest.mark.parametrize("generate", [ioi.generate, ioi_long.generate])
def test_a_seed_is_a_set_of_prompts(tok, generate):
    one, same, other = (generate(tok, 20, seed) for seed in (1, 1, 2))
    assert one.texts == same.texts
    assert torch.equal(one.clean, same.clean)
    assert len(set(one.texts) & set(other.texts)) == 0
    assert generate(tok, 10, 1).texts == one.texts[:10]


# -- the long form ---------------------------------------------------------------------------------------------


@pytest.mark.stays
@pytest.mark.parametrize("clauses", [0, 1, 5])
def test_the_lead_in_is_the_same_in_both_prompts(tok, clauses):
    prompts = ioi_long.generate(tok, 20, clauses=clauses)
    for clean, corrupt in prompts.texts:
        found = [clause for clause in ioi_long.LEAD_INS if clause in clean]
        assert len(found) == clauses
        assert found == [clause for clause in ioi_long.LEAD_INS if clause in corrupt]
        lead = sum(len(clause) + 1 for clause in found)
        assert clean[:lead] == corrupt[:lead]
        assert len(names_in(clean)) == 3
        assert not names_in(clean[:lead])


@pytest.mark.stays
def test_clauses_make_it_longer(tok):
    lengths = [ioi_long.generate(tok, 10, clauses=clauses).clean.shape[1] for clauses in (0, 3, 6)]
    assert lengths == sorted(lengths)
    assert lengths[2] > 2 * lengths[0]
