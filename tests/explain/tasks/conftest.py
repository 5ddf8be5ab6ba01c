import re
from types import SimpleNamespace

import pytest
import torch

from fewedges.explain.tasks import docstring, greater_than, ioi, ioi_long

TEXTS = [*ioi.TEMPLATES, *ioi_long.LEAD_INS, *greater_than.TEMPLATES, 'the def self @param :param (,)"=+.']
TEXTS += [*ioi.NAMES, *ioi.PLACES, *ioi.THINGS, *greater_than.NOUNS]
TEXTS += [*docstring.METHODS, *docstring.ARGUMENTS, *docstring.WORDS]


def word_tokenizer(digits=1, bos=False, without=(), more=()):
    """A tokenizer of the words of our tasks, marks, and numbers of at most `digits` digits; the rest is unknown."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    numbers = [f"{n:0{size}d}" for size in range(1, digits + 1) for n in range(10**size)]
    found = [piece for text in [*TEXTS, *more] for piece in re.findall(r"[^\W\d]+|[^\w\s]", text)]
    words = ["<unk>", "<s>", *numbers, *dict.fromkeys(x for x in found if x not in without)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    parts = [Regex(r"\s+"), Regex(rf"\d{{1,{digits}}}"), Regex(r"[^\w\s]")]
    ways = ["removed", "isolated", "isolated"]
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(part, behavior=way) for part, way in zip(parts, ways, strict=True)]
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    ends = {"bos_token": "<s>", "eos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **ends)


class Oracle(torch.nn.Module):
    """A model that knows what to say: `says` gives the logits at a prompt's end from its tokens."""

    device = torch.device("cpu")

    def __init__(self, says, vocabulary):
        super().__init__()
        self.says, self.vocabulary = says, vocabulary

    def forward(self, input_ids, use_cache, logits_to_keep):
        rows = [[self.says(row[: end + 1]) for end in logits_to_keep.tolist()] for row in input_ids.tolist()]
        return SimpleNamespace(logits=torch.tensor(rows, dtype=torch.float32))


@pytest.fixture(scope="session")
def words():
    return word_tokenizer


@pytest.fixture(scope="session")
def tok():
    return word_tokenizer()


@pytest.fixture
def oracle():
    return Oracle
