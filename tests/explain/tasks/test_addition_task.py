import pytest
import torch

from fewedges.data import addition as sums
from fewedges.errors import DataError
from fewedges.explain.tasks import addition as task
from fewedges.explain.tasks import check_solved, prompts_for


@pytest.fixture(scope="module")
def tokenizer():
    return sums.tokenizer()


@pytest.mark.matches
@pytest.mark.parametrize(("digit", "place"), [("hundreds", 0), ("tens", 1), ("ones", 2)])
def test_the_answer_is_the_digit_of_the_sum_and_the_wrong_one_that_of_the_other_sum(tokenizer, digit, place):
    prompts = task.generate(tokenizer, 80, digit=digit)
    held_out = set(tokenizer.batch_decode(sums.split().held_out, skip_special_tokens=True))
    for texts, answers, wrong in zip(prompts.texts, prompts.answers, prompts.wrong, strict=True):
        totals = [f"{sum(map(int, text.split('=')[0].split('+'))):03d}" for text in texts]
        said = [text.split("=")[1] for text in texts]
        assert said == [total[:place] for total in totals]
        assert tokenizer.decode(answers) == totals[0][place]
        assert tokenizer.decode(wrong) == totals[1][place]
        assert f"{texts[0].split('=')[0]}={totals[0]}" in held_out
        assert sum(x == y for x, y in zip(*(text.split("=")[0].split("+") for text in texts), strict=True)) == 1


@pytest.mark.matches
def test_prompts_are_the_tokens_the_model_was_trained_on(tokenizer):
    prompts = task.generate(tokenizer, 8, digit="ones")
    problem = prompts.texts[0][0].split("=")[0]
    a, b = (torch.tensor(int(x)) for x in problem.split("+"))
    assert torch.equal(prompts.clean[0], sums.encode(a, b)[:9])


@pytest.mark.matches
@pytest.mark.parametrize(("digit", "rest"), [("hundreds", []), ("tens", ["="]), ("ones", ["=", "s100"])])
def test_every_character_has_a_role(tokenizer, digit, rest):
    prompts = task.generate(tokenizer, 4, digit=digit)
    assert set(prompts.places) == {("start", "a10", "a1", "+", "b10", "b1", *rest, "END")}


@pytest.mark.stays
def test_halves_share_no_sum_in_either_order(tokenizer):
    halves = task.generate(tokenizer, 400).split()
    sides = [{frozenset(clean.split("=")[0].split("+")) for clean, _ in half.texts} for half in halves]
    assert sides[0].isdisjoint(sides[1])
    assert [len(half) for half in halves] == [200, 200]


@pytest.mark.matches
def test_the_built_in_model_does_the_task_and_not_the_shuffled_one(addition):
    prompts = prompts_for("addition", addition.tokenizer, 64)
    found = check_solved({"dense": addition.model}, prompts)["dense"]
    assert found.accuracy == found.first == 1.0
    assert found.clean > 5 > -5 > found.corrupt  # measured 20.8 and -20.6
    with pytest.raises(DataError, match="near chance"):
        check_solved({"dense": addition.model}, prompts.shuffled())


@pytest.mark.survives
def test_more_problems_than_there_are_or_another_digit_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"2001 prompts of addition \(tens\): only \d+ can be"):
        task.generate(tokenizer, 2_001)
    with pytest.raises(DataError, match="one of hundreds, tens, ones"):
        task.generate(tokenizer, 4, digit="thousands")


@pytest.mark.stays
def test_problems_to_train_on_can_be_asked_for(tokenizer):
    train = set(tokenizer.batch_decode(sums.split().train[:, :7], skip_special_tokens=True))
    texts = task.generate(tokenizer, 50, digit="hundreds", held_out=False).texts
    assert {clean for clean, _ in texts} <= train
