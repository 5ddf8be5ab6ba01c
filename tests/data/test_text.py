"""Windows of text: each once per epoch, whatever the files look like; and files that must be refused by name."""

import gzip
import json
import lzma

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewedges.data import text
from fewedges.data.text import SEPARATOR, Text, read_text, token_stream
from fewedges.errors import DataError
from fewedges.store import cache_folder, sha256_of

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran"]
FIRST, SECOND = "the cat sat on a mat\n", "a dog ran\nthe mat sat\n"
DOCUMENTS = f"{FIRST}{SEPARATOR}\n{SECOND}"


def word_tokenizer(words=WORDS, separator=True, lower=False):
    """One id per word, 0 for unknown ones, and with `separator` the last id for <|endoftext|>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", *words, *([SEPARATOR] if separator else [])]
    rules = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        rules.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=rules)


def ids(words):
    return [["<unk>", *WORDS, SEPARATOR].index(w) for w in words.split()]


WANTED = [*ids(FIRST), 9, *ids(SECOND), 9]


@pytest.fixture
def tok():
    return word_tokenizer()


class Counting:
    """A tokenizer that counts how often it is asked to tokenise."""

    def __init__(self, inner):
        self.inner, self.calls = inner, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.inner(*args, **kwargs)

    def __len__(self):
        return len(self.inner)

    def __getattr__(self, name):
        return getattr(self.inner, name)


def write(path, content):
    opens = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opens(path, "wt", encoding="utf-8") as handle:
        handle.write(content)
    return path


# -- windows ---------------------------------------------------------------------------------------------------


@pytest.mark.stays
@given(st.integers(4, 60), st.integers(2, 4), st.integers(0, 2**31), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_an_epoch_reads_every_window_once(tokens, length, seed, size, epoch):
    source = Text("numbers", np.arange(tokens, dtype=np.uint16), length, seed)
    whole = tokens // length
    assert source.windows == whole
    seen = [row for step in range((epoch + 1) * whole // size + 2) for row in source.at(step, size).tokens.tolist()]
    first = sorted(row[0] for row in seen[epoch * whole : (epoch + 1) * whole])
    assert first == [i * length for i in range(whole)]
    assert all(row == list(range(row[0], row[0] + length)) for row in seen)


@pytest.mark.reproduces
@given(st.integers(0, 2**31), st.integers(0, 200), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_a_batch_is_a_function_of_seed_and_step_alone(seed, step, size):
    stream = np.arange(50, dtype=np.uint32)
    walked, fresh = Text("walked", stream, 4, seed), Text("fresh", stream, 4, seed)
    walked.at(step + 7, size)
    walked.at(0, 1)
    text._PERMUTATIONS.clear()
    a, b = walked.at(step, size), fresh.at(step, size)
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.counts, b.counts)
    one_by_one = torch.cat([fresh.at(step * size + i, 1).tokens for i in range(size)])
    assert torch.equal(one_by_one, a.tokens)  # the order does not depend on the batch size


@pytest.mark.reproduces
def test_epochs_and_seeds_have_orders_of_their_own():
    stream = np.arange(400, dtype=np.uint16)
    orders = [Text("t", stream, 4, seed).at(epoch, 100).tokens[:, 0].tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.matches
def test_all_but_the_first_token_of_a_window_count():
    batch = Text("t", np.arange(40, dtype=np.uint16), 5).at(0, 3)
    assert batch.tokens.dtype == torch.int64
    assert batch.counts.tolist() == [[False, True, True, True, True]] * 3


# -- files -----------------------------------------------------------------------------------------------------


@pytest.mark.matches
@pytest.mark.parametrize("suffix", [".txt", ".md", ".txt.xz", ".txt.gz"])
def test_documents_of_a_text_file_are_parted_by_the_separator_line(tmp_path, tok, suffix):
    path = write(tmp_path / f"text{suffix}", DOCUMENTS)
    stream, facts = token_stream(path, tok)
    assert stream.tolist() == WANTED
    assert facts == {"sha256": sha256_of(path), "max_tokens": None}


@pytest.mark.matches
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz", ".jsonl.gz"])
def test_documents_of_a_jsonl_file_are_its_rows(tmp_path, tok, suffix):
    rows = [json.dumps({"text": document, "other": 1}) + "\n" for document in (FIRST, SECOND)]
    stream, _ = token_stream(write(tmp_path / f"text{suffix}", "".join(rows)), tok)
    assert stream.tolist() == WANTED


AT_THE_ENDS = [
    f"{DOCUMENTS}{SEPARATOR}\n",
    f"{SEPARATOR}\n{DOCUMENTS}",
    DOCUMENTS.replace("\n", "\r\n"),
    DOCUMENTS[:-1],
]


@pytest.mark.matches
@pytest.mark.parametrize("content", AT_THE_ENDS, ids=["last", "first", "carriage returns", "no last line end"])
def test_separators_at_the_ends_and_line_ends_make_no_empty_documents(tmp_path, tok, content):
    path = tmp_path / "text.txt"
    path.write_bytes(content.encode())
    assert token_stream(path, tok)[0].tolist() == WANTED


@pytest.mark.matches
def test_a_separator_within_a_line_is_text(tmp_path):
    path = write(tmp_path / "text.txt", f"the {SEPARATOR} cat\n")
    assert token_stream(path, word_tokenizer(separator=False))[0].tolist() == ids("the <unk> <unk> <unk> cat")


@pytest.mark.matches
def test_without_a_separator_token_the_end_of_text_token_parts_documents_or_nothing(tmp_path):
    path = write(tmp_path / "text.txt", DOCUMENTS)
    bare = word_tokenizer(separator=False)
    assert token_stream(path, bare)[0].tolist() == [*ids(FIRST), *ids(SECOND)]
    bare.eos_token = "cat"
    assert token_stream(path, bare)[0].tolist() == [*ids(FIRST), 2, *ids(SECOND), 2]


@pytest.mark.matches
def test_a_folder_is_its_text_files_in_order_of_their_paths(tmp_path, tok):
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "x.jsonl.gz", json.dumps({"text": SECOND}))
    write(tmp_path / "a.txt.xz", FIRST)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    stream, facts = token_stream(tmp_path, tok)
    assert stream.tolist() == WANTED
    assert len(facts["sha256"]) == 64
    write(tmp_path / "b" / "x.jsonl.gz", json.dumps({"text": FIRST}))
    assert token_stream(tmp_path, tok)[1]["sha256"] != facts["sha256"]


@pytest.mark.matches
def test_a_long_document_is_cut_at_line_ends_and_loses_no_line(tmp_path, tok, monkeypatch):
    monkeypatch.setattr(text, "PIECE", 25)
    path = write(tmp_path / "text.txt", "the cat sat on a mat\n" * 5)
    stream = token_stream(path, tok)[0].tolist()
    assert [i for i in stream if i != 9] == ids(FIRST) * 5
    assert stream.count(9) == 3


@pytest.mark.matches
@pytest.mark.parametrize("limit", [1, 6, 7, 100])
def test_max_tokens_bounds_what_is_read(tmp_path, tok, limit):
    path = write(tmp_path / "text.txt", DOCUMENTS)
    stream, facts = token_stream(path, tok, limit)
    assert stream.tolist() == WANTED[:limit]
    assert facts["max_tokens"] == limit


@pytest.mark.matches
def test_many_documents_stop_being_read_at_max_tokens(tmp_path, tok):
    rows = [json.dumps({"text": "cat"}) for _ in range(600)]
    counting = Counting(tok)
    path = write(tmp_path / "text.jsonl", "\n".join([*rows, "not json"]))
    assert len(token_stream(path, counting, 300)[0]) == 300
    assert counting.calls == 1  # 256 rows of two tokens at a time
    with pytest.raises(DataError, match="line 601"):
        token_stream(path, tok)


@pytest.mark.matches
def test_a_text_says_what_it_is(tmp_path, tok):
    path = write(tmp_path / "text.txt", DOCUMENTS)
    found = read_text(path, tok, context_length=4, seed=3)
    assert found.windows == len(WANTED) // 4
    assert found.describe() == {
        "name": str(path),
        "tokens": len(WANTED),
        "context_length": 4,
        "sha256": sha256_of(path),
        "max_tokens": None,
    }
    assert found.seed == 3


@pytest.mark.matches
def test_ids_are_stored_in_as_few_bytes_as_they_fit_in(tmp_path, tok):
    path = write(tmp_path / "text.txt", DOCUMENTS)
    assert token_stream(path, tok)[0].dtype == np.uint16

    class Large(Counting):
        def __len__(self):
            return 2**16 + 1

    assert token_stream(path, Large(tok), 5)[0].dtype == np.uint32


# -- the cache -------------------------------------------------------------------------------------------------


@pytest.mark.reproduces
def test_a_second_read_comes_from_the_cache(tmp_path, tok):
    counting = Counting(tok)
    path = write(tmp_path / "text.txt", DOCUMENTS)
    first = token_stream(path, counting)[0].tolist()
    assert counting.calls == 1
    moved = path.rename(tmp_path / "moved.txt")
    again = token_stream(moved, counting)[0]
    assert again.tolist() == first
    assert isinstance(again, np.memmap)
    assert counting.calls == 1
    assert [p.suffixes for p in (cache_folder() / "tokens").iterdir()] == [[".npy"]]


@pytest.mark.reproduces
def test_other_content_other_limits_and_other_tokenizers_are_read_anew(tmp_path, tok):
    path = write(tmp_path / "text.txt", "The cat sat\n")
    first = token_stream(path, tok)[0].tolist()
    assert first == [0, 2, 3, 9]
    assert token_stream(path, word_tokenizer(WORDS[::-1]))[0].tolist() == [0, 7, 6, 9]
    assert token_stream(path, tok, 2)[0].tolist() == [0, 2]
    assert token_stream(path, word_tokenizer(lower=True))[0].tolist() == [
        1,
        2,
        3,
        9,
    ]  # the same vocabulary, other rules
    bare = word_tokenizer(separator=False)
    assert token_stream(path, bare)[0].tolist() == [0, 2, 3]
    bare.eos_token = "mat"
    assert token_stream(path, bare)[0].tolist() == [0, 2, 3, 6]
    write(path, "The dog sat\n")
    assert token_stream(path, tok)[0].tolist() == [0, 7, 3, 9]


@pytest.mark.survives
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_cache_file_is_our_error_and_named(tmp_path, tok, damage):
    path = write(tmp_path / "text.txt", DOCUMENTS)
    token_stream(path, tok)
    (cached,) = (cache_folder() / "tokens").iterdir()
    data = cached.read_bytes()
    cached.write_bytes({"truncated": data[:-5], "empty": b"", "text": b"not an array"}[damage])
    with pytest.raises(DataError, match=f"{cached.name}.*delete"):
        token_stream(path, tok)


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.survives
@pytest.mark.parametrize("content", ["", "\n \n", f"{SEPARATOR}\n{SEPARATOR}\n"], ids=["empty", "blank", "separators"])
def test_a_file_without_text_is_refused_by_name(tmp_path, content):
    path = write(tmp_path / "empty.txt", content)
    with pytest.raises(DataError, match=r"empty\.txt: no text in it"):
        token_stream(path, word_tokenizer(separator=False))


BROKEN = {
    "binary.txt": b"the cat \xff\xfe\x00 sat",
    "plain.txt.gz": b"the cat sat",
    "plain.txt.xz": b"the cat sat",
    "cut.txt.gz": gzip.compress(DOCUMENTS.encode() * 50)[:-20],
    "cut.txt.xz": lzma.compress(DOCUMENTS.encode() * 50)[:-20],
    "flipped.txt.gz": gzip.compress(b"the cat")[:10] + b"\xff\xff\xff" + gzip.compress(b"the cat")[13:],
    "flipped.txt.xz": lzma.compress(b"the cat")[:30] + b"\xff\xff\xff" + lzma.compress(b"the cat")[33:],
}


@pytest.mark.survives
@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_text_is_refused_by_name_even_in_a_folder(tmp_path, tok, name):
    write(tmp_path / "good.txt", FIRST)
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    for source in (path, tmp_path):
        with pytest.raises(DataError, match=f"{name}.*a UTF-8 text file"):
            token_stream(source, tok)
    assert not (cache_folder() / "tokens").exists()


@pytest.mark.survives
@pytest.mark.parametrize(
    "bad", ['{"txt": "a"}', "the cat", '["text"]', "null", "3", '{"text": 3}', '{"text": null}', ""]
)
def test_a_bad_jsonl_line_is_named_by_its_number(tmp_path, tok, bad):
    good = json.dumps({"text": FIRST})
    path = write(tmp_path / "rows.jsonl", "\n".join([good, good, bad, good]))
    with pytest.raises(DataError, match=r"rows\.jsonl line 3: no json object with a text field"):
        token_stream(path, tok)


@pytest.mark.survives
def test_a_missing_path_is_refused_by_name(tmp_path, tok):
    with pytest.raises(DataError, match=r"absent\.txt: no such file or folder.*existing file"):
        read_text(tmp_path / "absent.txt", tok, context_length=4, max_tokens=100)
    with pytest.raises(DataError, match=r"absent: no such file or folder.*--max-tokens"):
        read_text(tmp_path / "absent", tok, context_length=4)


@pytest.mark.survives
def test_a_hub_dataset_without_datasets_says_how_to_get_it(tok, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"owner/name: no such file, and the datasets package.*fewedges\[data\]"):
        token_stream("owner/name", tok, max_tokens=10)


@pytest.mark.survives
def test_a_folder_without_text_files_is_refused_by_name(tmp_path, tok):
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"no \.txt, \.md, \.jsonl"):
        token_stream(tmp_path, tok)


@pytest.mark.survives
def test_text_shorter_than_one_window_is_refused_with_both_numbers(tmp_path, tok):
    path = write(tmp_path / "short.txt", FIRST)
    assert read_text(path, tok, context_length=7).windows == 1
    with pytest.raises(DataError, match=r"short\.txt: 7 tokens, less than one window of 8.*smaller context_length"):
        read_text(path, tok, context_length=8)


@pytest.mark.matches
def test_a_hub_dataset_is_streamed_and_its_failures_are_ours(tok, monkeypatch):
    import sys
    from types import SimpleNamespace

    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        yield {"text": FIRST}
        if name == "breaks":
            raise ConnectionError("no route to the hub")
        yield {"text": SECOND}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert token_stream("owner/name", tok, max_tokens=9)[0].tolist() == WANTED[:9]
    assert asked == [("owner/name", {"split": "train", "streaming": True})]
    with pytest.raises(DataError, match="dataset breaks: no route to the hub"):
        token_stream("breaks", tok, max_tokens=9)
