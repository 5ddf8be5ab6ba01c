import inspect

import pytest

from fewedges.errors import DataError
from fewedges.explain.tasks import TASKS, Prompts, prompts_for, read_options


@pytest.mark.stays
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("bos", [False, True])
def test_every_task_gives_as_many_prompts_as_asked_for_with_one_signature(words, task, bos):
    tokenizer = words(bos=bos)
    prompts = prompts_for(task, tokenizer, 24, seed=3)
    assert isinstance(prompts, Prompts)
    assert len(prompts) == len(set(prompts.texts)) == 24
    assert (prompts.clean != prompts.corrupt).any(1).all()
    assert (prompts.mask.sum(1) == prompts.last + 1).all()
    assert not ((prompts.clean != prompts.corrupt) & ~prompts.mask).any()  # the padding is the same
    first, second = prompts.split()
    assert len(first) + len(second) == 24
    assert list(inspect.signature(TASKS[task]).parameters)[:3] == ["tokenizer", "count", "seed"]
    assert prompts.name.startswith(task)


@pytest.mark.stays
def test_a_hundred_and_twenty_eight_unless_told_otherwise(tok):
    assert len(prompts_for("ioi", tok)) == 128
    assert prompts_for("ioi-long", tok, 3).name == "ioi_long (abc, 3 clauses)"


@pytest.mark.survives
def test_an_unknown_task_or_option_is_refused_with_those_there_are(tok):
    with pytest.raises(DataError, match=r"task 'eoi': no such task\. Try: ioi, ioi_long, .*, or a \.csv"):
        prompts_for("eoi", tok)
    with pytest.raises(DataError, match=r"no option corrupt, ordre\. Try: its options: corruption, order"):
        prompts_for("ioi", tok, ordre="baba", corrupt="abc")
    with pytest.raises(DataError, match=r"no option seeds\. Try: its options: none"):
        prompts_for("greater_than", tok, seeds=3)
    with pytest.raises(DataError, match="its options: path, corrupt, metric, skip"):
        prompts_for("x.csv", tok, templates=1)


@pytest.mark.says
def test_options_are_read_from_words_of_the_command_line():
    words = ["corruption=s2_io_flip", "length=30", "skip=true", "layouts=[0, 1]"]
    assert read_options(words) == {"corruption": "s2_io_flip", "length": 30, "skip": True, "layouts": [0, 1]}
    assert read_options([]) == {}
    for bad, found in (("length", "no name=value"), ("=3", "no name=value"), ("a b=3", "no name"), ("x=[1", "no YAML")):
        with pytest.raises(DataError, match=found):
            read_options([bad])
