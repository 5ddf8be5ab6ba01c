import re

import pytest

from fewedges.errors import DataError
from fewedges.explain.tasks import greater_than


@pytest.fixture(scope="module")
def one(words):
    return words(digits=1)


@pytest.fixture(scope="module")
def two(words):
    return words(digits=2)


@pytest.mark.matches
@pytest.mark.parametrize("size", [1, 2])
def test_an_answer_is_what_a_later_year_goes_on_with(one, two, size):
    tokenizer = {1: one, 2: two}[size]
    assert greater_than.spelled(tokenizer)[1] == size
    labels = greater_than.labels_of(tokenizer, size)
    for year in greater_than.YEARS:
        later = {f"{other:02d}"[:size] for other in range(year + 1, 100)}
        numbers = {f"{number:0{size}d}" for number in range(10**size)}
        answers, wrong = ({*map(tokenizer.convert_ids_to_tokens, side)} for side in labels[year])
        assert answers == later
        assert wrong == numbers - later
        assert wrong


@pytest.mark.stays
@pytest.mark.parametrize("size", [1, 2])
def test_only_the_first_year_is_changed(one, two, size):
    prompts = greater_than.generate({1: one, 2: two}[size], 60)
    for row, (clean, corrupt) in enumerate(prompts.texts):
        (start,) = re.findall(r"\d{4}", clean)
        assert clean.endswith(f" {start[:2]}")
        assert corrupt == clean.replace(start, f"{start[:2]}01")
        assert 1 <= (prompts.clean[row] != prompts.corrupt[row]).sum() <= 3 - size
        assert int(start[2:]) in greater_than.YEARS
    assert set(prompts.template) == set(range(len(greater_than.TEMPLATES)))
    assert prompts.metric == "prob_diff"
    assert prompts.name == f"greater_than ({'tens digit' if size == 1 else 'two digits'})"


@pytest.mark.matches
@pytest.mark.parametrize("size", [1, 2])
def test_tokens_have_the_roles_of_their_digits(one, two, size):
    tokenizer = {1: one, 2: two}[size]
    prompts = greater_than.generate(tokenizer, 60)
    for row, places in enumerate(prompts.places):
        said = [tokenizer.convert_ids_to_tokens(token) for token in prompts.clean[row, : len(places)].tolist()]
        word = dict(zip(places, said, strict=True))
        (start,) = re.findall(r"\d{4}", prompts.texts[row][0])
        assert word["noun"] in greater_than.NOUNS
        assert word["XX"] == start[:size]
        assert word["YY"] == start[2 : 2 + size]
        assert word["END"] == start[2 - size : 2]
        if size == 1:
            assert (word["XX+1"], word["YY+1"], word["XX2"]) == (start[1], start[3], start[0])


@pytest.mark.matches
def test_the_metric_is_one_for_who_knows_and_minus_one_for_who_errs(two):
    import torch

    prompts = greater_than.generate(two, 12)
    for sign, side in ((1, prompts.answers), (-1, prompts.wrong)):
        logits = torch.full((12, len(two)), -30.0)
        for row, tokens in enumerate(side):
            logits[row, list(tokens)] = 5.0
        assert prompts.measure_metric(logits).tolist() == pytest.approx([sign] * 12, rel=0, abs=4e-7)  # measured 1.2e-7
        assert prompts.correct(logits).all() == (sign == 1)


@pytest.mark.survives
def test_years_in_other_pieces_are_refused(words):
    with pytest.raises(DataError, match="neither as century and two digits nor digit by digit"):
        greater_than.generate(words(digits=3), 4)


@pytest.mark.survives
def test_a_number_that_is_no_token_is_refused(words):
    with pytest.raises(DataError, match="1 numbers of 2 digits are not one token"):
        greater_than.labels_of(_without(words, "07"), 2)


def _without(words, number):
    """A tokenizer of two digits that lacks one number."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    text = words(digits=2).backend_tokenizer.to_str().replace(f'"{number}"', '"no number"')
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), unk_token="<unk>")


@pytest.mark.reproduces
def test_a_seed_is_a_set_of_prompts(one):
    assert greater_than.generate(one, 20, 1).texts == greater_than.generate(one, 20, 1).texts
    assert greater_than.generate(one, 20, 1).texts != greater_than.generate(one, 20, 2).texts
