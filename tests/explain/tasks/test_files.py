import json
import logging

import pytest

from fewedges.errors import DataError
from fewedges.explain.tasks import files, greater_than, prompts_for

OURS = [
    {"clean": "the market", "corrupt": "the station", "answers": [" library"], "wrong": [" garden", " farm"]},
    {"clean": "the old market", "corrupt": "the old hotel", "answers": [" Mary"], "wrong": [" John"]},
    {"clean": "the red door", "corrupt": "the blue door", "answers": [" key"], "wrong": [" sky"]},
]


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else "\n".join(map(json.dumps, content)))
        return path

    return write_file


def same(one, other):
    assert one.texts == other.texts
    assert one.clean.tolist() == other.clean.tolist()
    assert (one.answers, one.wrong) == (other.answers, other.wrong)


@pytest.mark.matches
def test_our_own_rows_are_read_alike_from_every_kind_of_file(tok, write):
    ids = tok.convert_tokens_to_ids
    lines = files.generate(tok, path=write("pairs.jsonl", OURS))
    assert lines.answers == ((ids("library"),), (ids("Mary"),), (ids("key"),))
    assert lines.wrong[0] == (ids("garden"), ids("farm"))
    assert (lines.name, lines.metric, lines.template) == ("pairs", "logit_diff", (0, 1, 2))
    same(lines, files.generate(tok, path=write("pairs.json", json.dumps(OURS))))
    renamed = [{**{k: v for k, v in row.items() if k != "wrong"}, "wrong_answers": row["wrong"]} for row in OURS]
    same(lines, files.generate(tok, path=write("circuit.json", json.dumps({"prompts": renamed}))))
    rows = [f"{r['clean']},{r['corrupt']},{'|'.join(r['answers'])},{'|'.join(r['wrong'])}" for r in OURS]
    same(lines, files.generate(tok, path=write("pairs.csv", "\n".join(["clean,corrupt,answers,wrong", *rows]))))


@pytest.mark.matches
def test_answers_may_be_token_ids(tok, write):
    text = "clean,corrupt,answer_ids,wrong_ids\nthe market,the station,5|6,7\n"
    prompts = files.generate(tok, path=write("ids.csv", text))
    assert (prompts.answers, prompts.wrong) == (((5, 6),), ((7,),))
    row = {"clean": "the market", "corrupt": "the station"}
    for labels in ({"answers": [5, 6], "wrong": [7]}, {"answer_ids": [5, 6], "wrong_ids": [7]}):
        same(prompts, files.generate(tok, path=write("ids.jsonl", [{**row, **labels}])))


@pytest.mark.matches
def test_templates_are_numbered_as_they_come(tok, write):
    rows = [{**row, "template": name} for row, name in zip(OURS, ["late", 3, "late"], strict=True)]
    assert files.generate(tok, path=write("t.jsonl", rows)).template == (0, 1, 0)


@pytest.mark.matches
def test_eap_ig_ioi(tok, write):
    head = "clean,corrupted,corrupted_hard,correct_idx,incorrect_idx"
    path = write(
        "ioi.csv", f'{head}\n"Mary and John, John to","Mary and John, Sam to","Mary and John, Mary to",14,15\n'
    )
    prompts = files.generate(tok, path=path)
    assert prompts.texts == (("Mary and John, John to", "Mary and John, Sam to"),)
    assert (prompts.answers, prompts.wrong, prompts.metric) == (((14,),), ((15,),), "logit_diff")
    assert files.generate(tok, path=path, corrupt="corrupted_hard").texts[0][1] == "Mary and John, Mary to"


@pytest.mark.matches
@pytest.mark.parametrize("column", ["label", "correct_idx"])
def test_eap_ig_greater_than(words, write, column):
    tokenizer = words(digits=2)
    path = write("gt.csv", f"clean,corrupted,{column}\nthe war from 1732 to 17,the war from 1701 to 17,32\n")
    prompts = files.generate(tokenizer, path=path)
    assert (prompts.answers[0], prompts.wrong[0]) == greater_than.labels_of(tokenizer, 2)[32]
    assert prompts.metric == "prob_diff"
    tens = files.generate(words(digits=1), path=path)
    assert [len(tens.answers[0]), len(tens.wrong[0])] == [7, 3]


@pytest.mark.matches
def test_mib_ioi(tok, write):
    row = {
        "prompt": "Mary and John, John gave to",
        "choices": ["Mary", "John"],
        "answerKey": 0,
        "template": "{a} and {b}",
        "s2_io_flip_counterfactual": {"prompt": "Mary and John, Mary gave to", "choices": [], "answerKey": 1},
        "abc_counterfactual": {"prompt": "Sam and Tom, Bob gave to", "choices": [], "answerKey": 1},
    }
    path = write("mib.jsonl", [row, {**row, "answerKey": 1}])
    prompts = files.generate(tok, path=path)
    mary, john = tok.convert_tokens_to_ids(["Mary", "John"])
    assert (prompts.answers, prompts.wrong) == (((mary,), (john,)), ((john,), (mary,)))
    assert prompts.texts[0] == ("Mary and John, John gave to", "Mary and John, Mary gave to")
    assert prompts.template == (0, 0)
    for name in ("abc", "abc_counterfactual"):
        assert files.generate(tok, path=path, corrupt=name).texts[0][1] == "Sam and Tom, Bob gave to"


@pytest.mark.reproduces
def test_a_count_draws_rows_by_seed_and_keeps_their_order(tok, write):
    rows = [{**OURS[0], "clean": f"the market {n:d}", "corrupt": f"the station {n:d}"} for n in range(9)]
    path = write("many.jsonl", rows)
    one, again, other = (files.generate(tok, 4, seed, path=path).texts for seed in (1, 1, 3))
    assert one == again != other
    assert list(one) == sorted(one)
    assert prompts_for(path, tok, 4, seed=1).texts == prompts_for(str(path), tok, 4, seed=1).texts == one
    assert len(prompts_for(path, tok)) == 9


@pytest.mark.survives
def test_a_row_that_cannot_be_used_is_named_or_left_out_by_wish(tok, write, caplog):
    bad = [{**OURS[0], "corrupt": "the old station"}, {**OURS[0], "answers": [" xylophone"]}]
    path = write("bad.jsonl", [OURS[1], *bad, OURS[2]])
    with pytest.raises(DataError, match=r"bad.jsonl row 2 \(and 1 more of 4\): clean and corrupt differ"):
        files.generate(tok, path=path)
    with caplog.at_level(logging.WARNING, logger="fewedges"):
        assert len(files.generate(tok, path=path, skip=True)) == 2
    assert "2 of 4 rows left out" in caplog.text
    with pytest.raises(DataError, match=r"3 prompts of .*: 2 usable rows"):
        files.generate(tok, 3, path=path, skip=True)


@pytest.mark.survives
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "no rows"),
        ("a.jsonl", "[1, 2]", "a row without names"),
        ("a.jsonl", "{", "JSONDecodeError"),
        ("a.json", "{}", "KeyError: 'prompts'"),
        ("a.csv", "clean,corrupt\n", "no rows"),
        ("a.csv", "clean,corrupt,answers,wrong\nthe market\n", "row 1: columns clean, corrupt, answers, wrong"),
        ("a.csv", "clean,corrupt,answers\nthe market,the hotel,a\n", "KeyError: 'wrong'"),
        ("a.csv", "clean,corrupt,answer_ids,wrong_ids\nthe market,the hotel,1,999999\n", "token 999999 is not in"),
        ("a.jsonl", '{"clean": 3, "corrupt": "the", "answers": [" a"], "wrong": [" b"]}', "no text"),
        ("a.jsonl", '{"prompt": "the", "choices": {"label": []}, "answerKey": 0}', "only IOI can be read"),
        ("a.csv", "clean,corrupted,label\nthe war 1732 to 17,the war 1701 to 17,132\n", "KeyError: 132"),
    ],
)
def test_a_file_that_is_something_else_is_refused(tok, write, name, content, message):
    with pytest.raises(DataError, match=message):
        files.generate(tok, path=write(name, content))


@pytest.mark.survives
def test_a_file_that_is_not_there_is_refused(tok, tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.csv: FileNotFoundError"):
        prompts_for(tmp_path / "nowhere.csv", tok)
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(DataError, match=r"none of \.csv, \.jsonl, \.json"):
        prompts_for(tmp_path / "x.txt", tok)
