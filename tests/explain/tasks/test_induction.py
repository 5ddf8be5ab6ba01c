import pytest
import torch

from fewedges.errors import DataError
from fewedges.explain.tasks import check_solved, induction


@pytest.mark.stays
@pytest.mark.parametrize("bos", [False, True])
def test_the_second_time_stops_before_what_came_the_first_time(words, bos):
    tokenizer = words(bos=bos)
    prompts = induction.generate(tokenizer, 50, length=7)
    assert prompts.clean[:, 0].eq(1).all() == bos
    for row in range(50):
        clean, corrupt = (x[row, int(bos) : prompts.last[row] + 1].tolist() for x in (prompts.clean, prompts.corrupt))
        first, again = clean[:7], clean[7:]
        assert len({*first}) == 7
        assert first[: len(again)] == again
        assert 3 <= len(again) <= 6
        assert prompts.answers[row] == (first[len(again)],)
        changed = [place for place, (x, y) in enumerate(zip(clean, corrupt, strict=True)) if x != y]
        assert changed == [len(again)]
        assert prompts.wrong[row] == (corrupt[len(again)],)
        assert not {0, 1} & {*clean, *corrupt}  # no special tokens


@pytest.mark.matches
def test_who_looks_back_solves_it_and_who_says_the_last_token_does_not(tok, oracle):
    def look_back(tokens):
        *before, now = tokens
        said = tokens[before.index(now) + 1] if now in before else now
        return torch.nn.functional.one_hot(torch.tensor(said), len(tok)).tolist()

    def repeat(tokens):
        return torch.nn.functional.one_hot(torch.tensor(tokens[-1]), len(tok)).tolist()

    prompts = induction.generate(tok, 30)
    found = check_solved({"looks back": oracle(look_back, len(tok))}, prompts)["looks back"]
    assert (found.accuracy, found.clean, found.corrupt) == (1.0, 1.0, -1.0)
    with pytest.raises(DataError, match=r"repeats: accuracy 0\.0% is near chance"):
        check_solved({"repeats": oracle(repeat, len(tok))}, prompts)


@pytest.mark.survives
@pytest.mark.parametrize(("count", "length"), [(0, 20), (4, 2), (4, 10_000)])
def test_what_cannot_be_drawn_is_refused(tok, count, length):
    with pytest.raises(DataError, match="below the vocabulary"):
        induction.generate(tok, count, length=length)


@pytest.mark.reproduces
def test_a_seed_is_a_set_of_prompts(tok):
    one, same, other = (induction.generate(tok, 9, seed) for seed in (1, 1, 2))
    assert one.describe() == same.describe()
    assert one.describe()["sha256"] != other.describe()["sha256"]
