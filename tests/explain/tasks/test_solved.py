import pytest
import torch

from fewedges.errors import DataError
from fewedges.explain.tasks import accuracy, check_solved, last_logits
from fewedges.explain.tasks.prompts import Prompts
from tiny import SUPPORTED, tiny_model

VOCABULARY = 61


def make(count=12, seed=0, metric="logit_diff", **rest):
    """Random prompts of 4 to 9 tokens, one answer against one wrong token."""
    random = torch.Generator().manual_seed(seed)
    last = torch.randint(3, 9, (count,), generator=random)
    last[0] = 8
    clean, corrupt = (torch.randint(2, VOCABULARY, (count, 9), generator=random) for _ in range(2))
    given = {
        "clean": clean,
        "corrupt": corrupt,
        "answers": tuple((int(row[0]),) for row in clean),
        "wrong": tuple((0,) for _ in clean),
        "template": tuple(range(count)),
        "texts": (("", ""),) * count,
    }
    return Prompts(name="made up", metric=metric, last=last, **{**given, **rest})


def says(token):
    """Logits that say one token."""
    return [float(place == token) for place in range(VOCABULARY)]


@pytest.mark.matches
@pytest.mark.parametrize("name", SUPPORTED)
def test_logits_at_the_end_are_those_of_the_prompt_alone(name):
    model, prompts = tiny_model(name), make(4)
    found = last_logits(model, prompts.clean, prompts.last)
    for row, end in enumerate(prompts.last.tolist()):
        alone = model(input_ids=prompts.clean[row : row + 1, : end + 1]).logits[0, -1]
        torch.testing.assert_close(found[row], alone, rtol=0, atol=2.8e-6)  # measured 7.2e-7


@pytest.mark.matches
def test_a_model_that_knows_the_first_token_is_measured_by_hand(oracle):
    prompts = make(12)
    found = accuracy(oracle(lambda tokens: says(tokens[0]), VOCABULARY), prompts, batch=5)
    assert (found.accuracy, found.first, found.chance, found.clean) == (1.0, 1.0, 0.5, 1.0)
    same = (prompts.clean[:, 0] == prompts.corrupt[:, 0]).double()
    assert found.corrupt == pytest.approx(same.mean().item())
    assert found.gap_error == pytest.approx((1 - same).std().item() / 12**0.5)
    assert found.prompts == 12


@pytest.mark.stays
def test_the_batch_changes_nothing():
    model, prompts = tiny_model(), make(7)
    found = [accuracy(model, prompts, batch=batch).describe() for batch in (1, 3, 32)]
    assert [one["accuracy"] for one in found] == [found[0]["accuracy"]] * 3
    for name in ("clean", "corrupt", "gap_error"):
        assert [one[name] for one in found] == pytest.approx([found[0][name]] * 3, rel=0, abs=1.5e-7)  # measured 3.8e-8


@pytest.mark.survives
def test_near_chance_is_an_error_that_names_the_model(oracle):
    prompts = make(40)
    knows, guesses = (oracle(lambda t, p=p: says(t[p]), VOCABULARY) for p in (0, 1))
    assert set(check_solved({"dense": knows}, prompts)) == {"dense"}
    with pytest.raises(DataError, match=r"circuit for made up \(40 prompts\): sparse: accuracy \d.\d% is near chance"):
        check_solved({"dense": knows, "sparse": guesses}, prompts)


@pytest.mark.survives
def test_a_model_that_is_right_whatever_the_prompt_has_no_circuit(oracle):
    prompts = make(20, answers=((5,),) * 20)
    with pytest.raises(DataError, match="the metric hardly tells them apart: 1 on clean and 1 on corrupt"):
        check_solved({"stubborn": oracle(lambda tokens: says(5), VOCABULARY)}, prompts)


@pytest.mark.survives
def test_logits_that_are_no_numbers_are_near_chance(oracle):
    nothing = oracle(lambda tokens: [float("nan")] * VOCABULARY, VOCABULARY)
    with pytest.raises(DataError, match="near chance"):
        check_solved({"broken": nothing}, make(4))


@pytest.mark.stays
@pytest.mark.parametrize(
    ("count", "right", "solved"), [(400, 0.59, False), (400, 0.61, True), (20, 0.8, False), (20, 0.9, True)]
)
def test_few_prompts_need_more_right_and_many_at_least_a_fifth(oracle, count, right, solved):
    prompts = make(count, answers=((1,),) * count, clean=torch.zeros(count, 9, dtype=torch.long))
    prompts.clean[: round(right * count), 0] = 1
    model = oracle(lambda tokens: says(1 if tokens[0] == 1 else 0), VOCABULARY)
    found = accuracy(model, prompts)
    assert found.accuracy == pytest.approx(right)
    assert ("near chance" not in found.trouble) == solved


@pytest.mark.says
def test_what_was_found_is_one_line(oracle):
    found = accuracy(oracle(lambda tokens: says(tokens[0]), VOCABULARY), make(12))
    assert str(found).startswith("accuracy 100.0% (chance 50.0%), first 100.0%, metric 1.000 clean, ")
