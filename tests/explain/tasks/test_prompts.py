import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.errors import DataError
from fewedges.explain.tasks.prompts import Prompts, check

METRICS = ("logit_diff", "prob_diff", "max_diff")


def make(count=4, metric="logit_diff", templates=None, **rest):
    """Prompts whose row r is tokens r + 1, with 1 to 3 answers and 1 to 2 wrong tokens out of 9."""
    last = [3 - row % 3 for row in range(count)]
    rows = [[row + 1] * (end + 1) + [0] * (3 - end) for row, end in enumerate(last)]
    given = {
        "clean": torch.tensor(rows),
        "corrupt": torch.tensor(rows) + 1,
        "last": torch.tensor(last),
        "answers": tuple(tuple(range(1 + row % 3)) for row in range(count)),
        "wrong": tuple(tuple(range(5, 6 + row % 2)) for row in range(count)),
        "template": tuple(templates or range(count)),
        "texts": tuple((f"clean {row}", f"corrupt {row}") for row in range(count)),
    }
    return Prompts(name="made up", metric=metric, **{**given, **rest})


def by_hand(metric, row, answers, wrong):
    if metric == "prob_diff":
        total = sum(map(math.exp, row))
        row = [math.exp(x) / total for x in row]
        return sum(row[x] for x in answers) - sum(row[x] for x in wrong)
    against = [row[x] for x in wrong]
    mean = sum(row[x] for x in answers) / len(answers)
    return mean - (max(against) if metric == "max_diff" else sum(against) / len(against))


@pytest.mark.matches
@pytest.mark.parametrize("metric", METRICS)
def test_the_metric_is_the_one_on_paper(metric):
    prompts = make(6, metric)
    logits = 3 * torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [by_hand(metric, *x) for x in zip(logits.tolist(), prompts.answers, prompts.wrong, strict=True)]
    found = prompts.measure_metric(logits)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=4e-16)  # measured 1e-16
    stacked = prompts.measure_metric(torch.stack([logits, 2 * logits, -logits]))
    assert stacked.shape == (3, 6)
    assert torch.equal(stacked[0], found)
    assert torch.equal(stacked[2], prompts.measure_metric(-logits))


@pytest.mark.matches
def test_the_gradient_of_a_logit_difference_is_one_at_the_answers_and_minus_one_at_the_wrong_ones():
    prompts = make(2)
    logits = torch.zeros(2, 9, requires_grad=True)
    prompts.measure_metric(logits).sum().backward()
    assert logits.grad.tolist() == [[1, 0, 0, 0, 0, -1, 0, 0, 0], [0.5, 0.5, 0, 0, 0, -0.5, -0.5, 0, 0]]


@pytest.mark.matches
def test_half_precision_logits_are_measured_in_single():
    prompts = make(3, "prob_diff")
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert torch.equal(prompts.measure_metric(logits), prompts.measure_metric(logits.float()))


@pytest.mark.matches
def test_correct_is_the_best_answer_above_the_best_wrong_token():
    logits = torch.zeros(4, 9)
    logits[:, 5] = 1.0  # wrong everywhere
    logits[1, 1], logits[2, 2], logits[3, 0] = 2.0, 0.5, 1.0  # above, below, a tie
    assert make(4).correct(logits).tolist() == [False, True, False, False]
    assert make(4).first(logits).tolist() == [False, True, False, True]  # a tie is shared
    logits[1, 8] = 3.0  # neither answer nor wrong, but on top
    assert make(4).correct(logits).tolist() == [False, True, False, False]
    assert make(4).first(logits).tolist() == [False, False, False, True]


@pytest.mark.matches
def test_correct_of_probabilities_is_all_answers_above_all_wrong_tokens():
    logits = torch.full((1, 9), -20.0)
    logits[0, :3], logits[0, 5] = 0.0, 0.5  # 3 e^0 against e^0.5: none alone is above, together they are
    prompts = make(1, "prob_diff", answers=((0, 1, 2),))
    assert prompts.correct(logits).tolist() == [True]
    assert make(1, "max_diff", answers=((0, 1, 2),)).correct(logits).tolist() == [False]


@pytest.mark.matches
def test_chance_is_the_share_of_answers():
    assert make(2).chance == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert make(1, answers=((0,),), wrong=((1, 2, 3),)).chance == 0.25
    assert make(2, "prob_diff").chance == 0.5


@pytest.mark.stays
@given(st.lists(st.integers(0, 5), min_size=2, max_size=30).filter(lambda x: len(set(x)) > 1), st.integers(0, 99))
@settings(deadline=None)
def test_halves_share_no_template_and_lose_no_prompt(templates, seed):
    prompts = make(len(templates), templates=templates)
    first, second = prompts.split(seed)
    assert set(first.template).isdisjoint(second.template)
    assert sorted(first.texts + second.texts) == sorted(prompts.texts)
    assert abs(len(first) - len(second)) <= max(map(templates.count, templates))


@pytest.mark.stays
def test_a_split_depends_on_its_seed_alone():
    prompts = make(12)
    assert prompts.split(3)[0].texts == prompts.split(3)[0].texts
    assert len({prompts.split(seed)[0].texts for seed in range(8)}) > 4


@pytest.mark.stays
def test_a_subset_is_its_rows_and_cuts_padding():
    prompts = make(6)
    some = prompts.subset([2, 5, 2])
    assert some.clean.tolist() == [[3, 3], [6, 6], [3, 3]]  # rows 2 and 5 end at position 1
    assert [some.answers[0], some.wrong[1], some.template[2]] == [prompts.answers[2], prompts.wrong[5], 2]
    logits = torch.randn(6, 9)
    assert torch.equal(some.measure_metric(logits[[2, 5, 2]]), prompts.measure_metric(logits)[[2, 5, 2]])


@pytest.mark.stays
@pytest.mark.parametrize("count", [2, 3, 17])
def test_shuffled_labels_are_those_of_another_prompt(count):
    marks = tuple((row,) for row in range(count))
    prompts = make(count, answers=marks, wrong=tuple((row + count,) for row in range(count)))
    mixed = prompts.shuffled(5)
    assert all(mine != other for mine, other in zip(prompts.answers, mixed.answers, strict=True))
    assert sorted(mixed.answers) == sorted(prompts.answers)
    assert [w[0] - a[0] for a, w in zip(mixed.answers, mixed.wrong, strict=True)] == [count] * count
    assert torch.equal(mixed.clean, prompts.clean)
    assert mixed.name == "made up, shuffled labels"


@pytest.mark.stays
def test_a_start_token_moves_everything_by_one():
    prompts = make(3)
    begun = prompts.with_start(8)
    assert begun.clean[:, 0].tolist() == begun.corrupt[:, 0].tolist() == [8, 8, 8]
    assert torch.equal(begun.clean[:, 1:], prompts.clean)
    assert torch.equal(begun.last, prompts.last + 1)
    assert begun.mask.sum(1).tolist() == (prompts.mask.sum(1) + 1).tolist() == [5, 4, 3]


ROLES = (("", "S1", "", ""), ("IO", "", "S2"), ("", ""), ("", "S1", "", ""))


@pytest.mark.matches
def test_places_are_roles_or_how_far_behind_one():
    assert make(4, roles=ROLES).places == (
        ("start", "S1", "S1+1", "END"),
        ("IO", "IO+1", "END"),
        ("start", "END"),
        ("start", "S1", "S1+1", "END"),
    )
    assert make(2).places == (("0", "1", "2", "3"), ("0", "1", "2"))


@pytest.mark.stays
def test_roles_go_with_their_prompts():
    prompts = make(4, roles=ROLES)
    assert prompts.subset([2, 1, 2]).roles == (ROLES[2], ROLES[1], ROLES[2])
    assert prompts.shuffled().roles == prompts.to("cpu").roles == ROLES
    begun = prompts.with_start(8)
    assert begun.roles[1] == ("", "IO", "", "S2")
    assert begun.places[0] == ("start", "start+1", "S1", "S1+1", "END")
    assert make(4).subset([1]).roles == make(4).with_start(8).roles == ()
    assert prompts.describe() == make(4).describe()


@pytest.mark.reproduces
def test_the_digest_sees_tokens_and_labels_but_not_padding():
    def digest(**rest):
        return make(3, **rest).describe()["sha256"]

    same = make(3).clean.clone()
    same[2, -1] = 7  # behind `last`
    assert digest() == digest(clean=same)
    same[0, 0] = 9
    assert (
        len({digest(), digest(clean=same), digest(wrong=((6,), (6,), (6,))), digest(last=torch.tensor([1, 1, 1]))}) == 4
    )


@pytest.mark.survives
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"corrupt": torch.zeros(4, 3, dtype=torch.long)}, "as wide as corrupt"),
        ({"template": (0, 1)}, "one length B"),
        ({"answers": ((0,), (), (1,), (2,))}, "prompt 1 has answers"),
        ({"wrong": ((5,), (5,), (1,), (5,))}, "no token in both"),
        ({"metric": "loss"}, "one of logit_diff"),
        ({"last": torch.tensor([1, 2, 3, 4])}, "last from 1 to 4"),
        ({"roles": (("",),)}, "one length B"),
        ({"roles": (("",) * 4, ("",) * 3, ("",) * 2, ("",) * 3)}, "one per token"),
    ],
)
def test_what_does_not_fit_together_is_refused(wrong, message):
    prompts = make(4)
    for name, value in wrong.items():  # behind the back of the type checks of our tests
        object.__setattr__(prompts, name, value)
    with pytest.raises(DataError, match=message):
        check(prompts)


@pytest.mark.survives
def test_prompts_are_checked_when_they_are_made():
    with pytest.raises(DataError, match="no token in both"):
        make(4, wrong=((5,), (5,), (1,), (5,)))


@pytest.mark.survives
def test_what_cannot_be_divided_is_refused():
    with pytest.raises(DataError, match="one template"):
        make(3, templates=[1, 1, 1]).split()
    with pytest.raises(DataError, match="one prompt"):
        make(1).shuffled()
    for rows in ([], [3], [-4]):
        with pytest.raises(DataError, match="one or more of 0 to 2"):
            make(3).subset(rows)


@pytest.mark.says
def test_prompts_say_what_they_are():
    text = str(make(4))
    assert text.splitlines()[:2] == ["made up: 4 prompts from 4 templates, at most 4 tokens", "  clean    'clean 0'"]
    assert "logit_diff: 1 answer token, 1 wrong" in text
    assert make(1, texts=(("<s>", "b"),))._repr_html_().count("&lt;s&gt;") == 1
    assert len(dataclasses.replace(make(4), name="x")) == 4
