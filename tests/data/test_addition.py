import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewedges.data import addition
from fewedges.data.addition import Sums, carries, encode, exact_match, examples, problems, split
from fewedges.errors import DataError


@pytest.fixture(scope="module")
def tok():
    return addition.tokenizer()


class Adder(torch.nn.Module):
    """Answers with what `lies` says for (a, b), else with the sum."""

    device = torch.device("cpu")

    def __init__(self, lies=None):
        super().__init__()
        self.lies = lies or {}

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, len(addition.VOCABULARY))
        for row, out in zip(input_ids.tolist(), logits, strict=True):
            a, b = (10 * row[i] + row[i + 1] - 11 for i in (1, 4))
            for place, digit in enumerate(f"{self.lies.get((a, b), a + b):03d}"):
                if 6 + place < len(row):
                    out[6 + place, int(digit) + 1] = 1.0
        return SimpleNamespace(logits=logits)


@pytest.mark.matches
def test_every_problem_is_what_the_tokenizer_writes(tok):
    texts = [f"{a:02d}+{b:02d}={a + b:03d}" for a in range(100) for b in range(100)]
    assert torch.equal(problems(), torch.tensor(tok(texts).input_ids))
    assert problems().dtype == torch.int64
    assert problems().shape == (10_000, addition.LENGTH)


@pytest.mark.matches
def test_carries_are_those_on_paper():
    assert [carries(a, b) for a, b in [(21, 34), (17, 35), (71, 35), (67, 58), (45, 55), (99, 0)]] == [
        0,
        1,
        1,
        2,
        2,
        0,
    ]


@pytest.mark.stays
@given(a=st.integers(0, 99), b=st.integers(0, 99))
def test_carries_explain_the_digit_sum(a, b):
    def total(n):
        return sum(map(int, str(n)))

    assert total(a) + total(b) - total(a + b) == 9 * carries(a, b)


@pytest.mark.stays
def test_split_holds_every_problem_once():
    both = torch.cat(split())
    assert [len(part) for part in split()] == [8_000, 2_000]
    assert torch.equal(both.unique(dim=0), problems().unique(dim=0))


@pytest.mark.reproduces
def test_split_is_the_one_the_shipped_model_was_trained_on(tok):
    assert tok.batch_decode(split().held_out[:3], skip_special_tokens=True) == [
        "72+55=127",
        "21+16=037",
        "29+19=048",
    ]


@pytest.mark.says
def test_examples_show_no_one_and_two_carries_and_are_held_out(tok):
    texts = tok.batch_decode(split().held_out, skip_special_tokens=True)
    assert [carries(int(text[:2]), int(text[3:5])) for text in examples()] == [0, 1, 2]
    assert set(examples()) <= set(texts)


@pytest.mark.matches
def test_tokenizer_puts_the_beginning_first_and_decodes_to_the_text(tok):
    assert tok("17+35=").input_ids == [0, 2, 8, 11, 4, 6, 12]
    assert tok.decode(tok("17+35=").input_ids, skip_special_tokens=True) == "17+35="
    assert tok.bos_token_id == 0
    assert len(tok) == len(addition.VOCABULARY)


@pytest.mark.reproduces
def test_tokenizer_survives_a_folder(tok, tmp_path):
    from transformers import AutoTokenizer

    tok.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("17+35=").input_ids == tok("17+35=").input_ids


@pytest.mark.survives
@pytest.mark.parametrize("text", ["1 7", "x", "1\n"])
def test_tokenizer_refuses_other_characters(tok, text):
    with pytest.raises(Exception, match="UNK"):
        tok(text)


@pytest.mark.reproduces
def test_a_batch_depends_on_seed_and_step_alone():
    sums = Sums(seed=3)
    later = sums.at(40, 128)
    for step in random.Random(0).sample(range(80), 5):
        sums.at(step, 128)
    assert torch.equal(sums.at(40, 128).tokens, later.tokens)
    assert torch.equal(Sums(seed=3).at(40, 128).tokens, later.tokens)
    assert not torch.equal(Sums(seed=4).at(40, 128).tokens, later.tokens)
    assert not torch.equal(sums.at(41, 128).tokens, later.tokens)


@pytest.mark.stays
@given(size=st.integers(1, 30), epoch=st.integers(0, 4), seed=st.integers(0, 5))
def test_an_epoch_reads_every_problem_once_whatever_the_batch(size, epoch, seed):
    rows = encode(torch.arange(12), torch.zeros(12, dtype=torch.long))
    sums = Sums(seed=seed, tokens=rows)
    read = torch.cat([sums.at(step, size).tokens for step in range(12 * (epoch + 1) // size + 1)])
    seen = read[12 * epoch : 12 * (epoch + 1)]
    assert torch.equal(seen.unique(dim=0), rows.unique(dim=0))


@pytest.mark.stays
def test_epochs_differ_in_order():
    sums = Sums()
    assert not torch.equal(sums.at(0, 8_000).tokens, sums.at(1, 8_000).tokens)


@pytest.mark.stays
def test_only_answer_digits_count():
    batch = Sums().at(0, 4)
    assert batch.counts.dtype == torch.bool
    assert batch.counts.tolist() == [[False] * 7 + [True] * 3] * 4


@pytest.mark.survives
@pytest.mark.parametrize(("step", "size"), [(-1, 8), (0, 0)])
def test_a_batch_that_cannot_be_is_refused(step, size):
    with pytest.raises(DataError, match=f"step {step}, size {size}"):
        Sums().at(step, size)


@pytest.mark.matches
def test_exact_match_counts_whole_answers():
    rows = encode(torch.tensor([17, 99, 50, 21]), torch.tensor([35, 99, 50, 16]))
    assert exact_match(Adder(), rows, batch=3) == 1.0
    # one lie in every place: hundreds, tens, ones
    assert exact_match(Adder({(17, 35): 152, (99, 99): 188, (50, 50): 101}), rows, batch=3) == 0.25


@pytest.mark.matches
def test_exact_match_is_that_of_decoding_greedily():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    # wide initial weights: an untrained model that answers differently from problem to problem
    sizes = {"vocab_size": 13, "n_positions": 10, "n_embd": 32, "n_layer": 2, "n_head": 2}
    ids = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ids, initializer_range=1.0)).eval()
    prompts = problems()[::101, :7]
    written = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=3, do_sample=False)
    assert exact_match(model, written) == 1.0  # what it writes is what it would write
    wrong = written.clone()
    wrong[: len(wrong) // 2, 7] = (wrong[: len(wrong) // 2, 7] + 1) % 13
    assert exact_match(model, wrong) == 0.5


@pytest.mark.stays
@pytest.mark.parametrize("training", [True, False])
def test_exact_match_leaves_the_mode_as_it_was(training):
    model = Adder().train(training)
    exact_match(model, problems()[:2])
    assert model.training is training
