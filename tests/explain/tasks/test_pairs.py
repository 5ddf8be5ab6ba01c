import dataclasses
import itertools

import pytest

from fewedges.errors import DataError
from fewedges.explain.tasks.pairs import Pair, Span, build, encode, single, spans, tokens_of


def pair(clean="the market", corrupt="the station", answers=(" library",), wrong=(" garden",), template=0):
    return Pair(clean=clean, corrupt=corrupt, answers=answers, wrong=wrong, template=template)


@pytest.mark.matches
def test_pairs_become_padded_tokens(tok):
    draws = [pair(), pair("the old market", "the old hotel", wrong=(" garden", " farm", " garden"), template=4)]
    prompts = build(tok, iter(draws), 2, name="two", metric="max_diff")
    ids = tok.convert_tokens_to_ids
    assert prompts.clean.tolist() == [[*ids(["the", "market"]), 1], ids(["the", "old", "market"])]
    assert prompts.corrupt.tolist() == [[*ids(["the", "station"]), 1], ids(["the", "old", "hotel"])]
    assert prompts.last.tolist() == [1, 2]
    assert prompts.answers == ((ids("library"),),) * 2
    assert prompts.wrong == ((ids("garden"),), (ids("garden"), ids("farm")))  # said twice, counted once
    assert prompts.template == (0, 4)
    assert prompts.texts[1] == ("the old market", "the old hotel")


@pytest.mark.matches
def test_a_start_token_stands_where_the_tokenizer_puts_one(words):
    plain, begun = (build(words(bos=bos), iter([pair()]), 1, name="one", metric="max_diff") for bos in (False, True))
    assert begun.clean.tolist() == [[1, *plain.clean[0].tolist()]]
    assert begun.last.item() == plain.last.item() + 1
    assert (begun.answers, begun.wrong) == (plain.answers, plain.wrong)


@pytest.mark.stays
@pytest.mark.parametrize(
    ("strange", "why"),
    [
        (pair(corrupt="the old station"), "differ in their number"),
        (pair(corrupt="the  market"), "the same"),
        (pair(answers=(" library garden",)), "not one token"),
        (pair(answers=("",)), "not one token"),
        (pair(wrong=(" basket beach",)), "not one token"),
        (pair(wrong=(" xylophone",)), "unknown"),
        (pair(clean="the xylophone"), "unknown"),
        (pair(wrong=(" library",)), "no token tells"),
        (pair(wrong=()), "no token tells"),
    ],
)
def test_a_pair_that_cannot_be_told_apart_is_left_out_with_its_reason(tok, strange, why):
    (found,) = tokens_of(tok, [strange])
    assert why in found
    kept = build(tok, iter([strange, pair()]), 1, name="one", metric="logit_diff")
    assert kept.texts == (("the market", "the station"),)
    with pytest.raises(DataError, match=f"only 1 can be written with this tokenizer; most often .*{why}"):
        build(tok, iter([strange, pair(), strange]), 2, name="two", metric="logit_diff")


@pytest.mark.stays
def test_the_same_pair_counts_once_and_drawing_comes_to_an_end(tok):
    with pytest.raises(DataError, match=r"3 prompts of same: only 1 can be"):
        build(tok, itertools.repeat(pair()), 3, name="same", metric="logit_diff")


@pytest.mark.matches
@pytest.mark.parametrize("bos", [False, True])
def test_a_span_names_the_first_token_that_holds_some_of_it(words, bos):
    clean = "the market and the station"
    marked = dataclasses.replace(pair(clean, "the garden and the station"), spans=(Span("M", 4, 10), Span("S", 11, 26)))
    prompts = build(words(bos=bos), iter([marked, pair()]), 2, name="two", metric="max_diff")
    start = ("",) * bos
    assert prompts.roles == ((*start, "", "M", "S", "", ""), (*start, "", ""))
    assert build(words(bos=bos), iter([pair()]), 1, name="one", metric="max_diff").roles == ()


@pytest.mark.matches
def test_tokens_with_the_space_before_them_have_the_role_of_their_word():
    """As in GPT-2 and SmolLM2: a token is a word with its space, or a piece of a word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["t", "h", "e", "r", "o", "b", "n", "Ġ", "th", "the", "Ġr", "Ġro", "bi", "i", "n", "Ġrob", "in", "s"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "r"), ("Ġr", "o"), ("Ġro", "b"), ("i", "n")]
    vocabulary = {piece: n for n, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="s")
    robin = Pair(clean="the robin robin", corrupt="the the robin", answers=(0,), wrong=(1,), spans=(Span("R", 10, 15),))
    assert [tokenizer.decode([n]) for n in tokenizer(robin.clean)["input_ids"]] == ["the", " rob", "in", " rob", "in"]
    prompts = build(tokenizer, iter([robin]), 1, name="one", metric="max_diff")
    assert prompts.roles == (("", "", "", "R", ""),)


@pytest.mark.stays
def test_a_tokenizer_that_cannot_say_where_its_tokens_stand_gives_no_roles(tok, monkeypatch):
    monkeypatch.setattr(type(tok), "is_fast", property(lambda _: False))
    marked = dataclasses.replace(pair(), spans=(Span("M", 4, 10),))
    assert build(tok, iter([marked]), 1, name="one", metric="max_diff").roles == ()


@pytest.mark.matches
def test_spans_are_where_a_template_puts_its_words():
    template, words = "{a} and {b} or {a}{c}", {"a": "Mary", "b": 17, "c": "!"}
    text = template.format(**words)
    found = spans(template, words, {"a": "A", "b": "B"})
    assert [(role, text[start:end]) for role, start, end in found] == [("A", "Mary"), ("B", "17"), ("A", "Mary")]
    assert [start for _, start, _ in found] == [0, 9, 15]


@pytest.mark.matches
def test_words_of_one_token_are_found(tok):
    names = ["market", "xylophone", "station market", "hotel"]
    assert single(tok, names, 2, name="x") == ["market", "hotel"]
    with pytest.raises(DataError, match="2 of 4 words are one token of this tokenizer"):
        single(tok, names, 3, name="x")


@pytest.mark.survives
def test_a_count_below_one_is_refused(tok):
    with pytest.raises(DataError, match="at least 1"):
        build(tok, iter([pair()]), 0, name="none", metric="logit_diff")


@pytest.mark.survives
def test_a_tokenizer_that_refuses_a_character_is_named():
    from fewedges.data.addition import tokenizer

    with pytest.raises(DataError, match="'market': the tokenizer cannot write it"):
        encode(tokenizer(), ["market"])
    assert encode(tokenizer(), ["1+"]) == [[0, 2, 11]]
