"""GPT-2s with hand-made weights whose circuits are known, and the prompts that use them.

The residual stream holds named parts side by side: `token` (one-hot), `place` (one-hot position), `mark` and `out`
(one number per token; the logits are `out`). Norms do nothing. Every other weight is random at a thousandth of the
planted ones, and all heads and MLPs that are not planted write noise into a part that only they read.
"""

import torch
from torch import nn

from fewedges.explain.tasks.prompts import Prompts

TOKENS, PLACES, WIDTH, HEADS = 8, 8, 48, 3
SIZE = WIDTH // HEADS
PARTS = {"token": (0, 8), "place": (8, 8), "mark": (16, 8), "out": (24, 8), "noise": (32, 16)}
SHARP = 40.0
"""Attention scores of the planted heads, before they are divided by sqrt(head width) = 4."""


class Same(nn.Module):
    """In place of a norm."""

    def forward(self, x):
        return x * 1


class Planted:
    """A model to plant in, and the edges planted so far."""

    def __init__(self, layers=1, noise=1e-3, seed=0):
        import transformers as tf

        torch.manual_seed(seed)
        config = tf.GPT2Config(
            vocab_size=TOKENS,
            n_positions=PLACES,
            n_embd=WIDTH,
            n_layer=layers,
            n_head=HEADS,
            activation_function="relu",
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        self.model = tf.GPT2LMHeadModel(config).double().eval().requires_grad_(False)
        for block in self.model.transformer.h:
            block.ln_1, block.ln_2 = Same(), Same()
        self.model.transformer.ln_f = Same()
        for parameter in self.model.parameters():
            parameter.normal_().mul_(noise)
        self._noise_parts()
        self.at("token", self.model.transformer.wte.weight, 1).copy_(torch.eye(TOKENS))
        self.at("place", self.model.transformer.wpe.weight, 1).copy_(torch.eye(PLACES))
        self.at("out", self.model.lm_head.weight, 1).copy_(torch.eye(TOKENS))
        self.edges = set()

    def at(self, part, matrix, dim=0):
        """The rows (or columns) of a matrix that belong to a part of the stream."""
        start, length = PARTS[part]
        return matrix.narrow(dim, start, length)

    def head(self, layer, head, *, read, write="out", only=range(TOKENS)):
        """Carry a part of one-hots, of these tokens only, to `write`; return its query, key matrices and biases."""
        attention = self.model.transformer.h[layer].attn
        weight, bias = attention.c_attn.weight, attention.c_attn.bias
        columns = [weight[:, n * WIDTH + head * SIZE : n * WIDTH + (head + 1) * SIZE] for n in range(3)]
        rows = attention.c_proj.weight[head * SIZE : (head + 1) * SIZE]
        _ = [x.zero_() for x in (*columns, rows)]
        for token in only:
            self.at(read, columns[2])[token, token] = 1
        self.at(write, rows, 1)[:TOKENS].copy_(torch.eye(TOKENS))
        return columns[0], columns[1], bias[head * SIZE : (head + 1) * SIZE]

    def look_at_place(self, layer, head, place, **carry):
        """A head that always attends to one position."""
        _, key, query_bias = self.head(layer, head, **carry)
        query_bias[0] = SHARP
        self.at("place", key)[place, 0] = 1

    def mlp(self, layer, units):
        """Hidden units (part read, token weights, threshold, token weights written to out)."""
        mlp = self.model.transformer.h[layer].mlp
        for parameter in mlp.parameters():
            parameter.zero_()
        for n, (part, reads, threshold, writes) in enumerate(units):
            self.at(part, mlp.c_fc.weight)[:, n] = torch.tensor(reads, dtype=torch.float64)
            mlp.c_fc.bias[n] = -threshold
            self.at("out", mlp.c_proj.weight, 1)[n] = torch.tensor(writes, dtype=torch.float64)

    def _noise_parts(self):
        for block in self.model.transformer.h:
            for matrix in (block.attn.c_attn.weight, block.mlp.c_fc.weight):
                self.at("noise", matrix).normal_().mul_(0.3)
                self.at("token", matrix).normal_().mul_(0.3)
            for matrix in (block.attn.c_proj.weight, block.mlp.c_proj.weight):
                self.at("noise", matrix, 1).normal_().mul_(0.3)


def one_hot(token, value=1.0):
    return [value * (n == token) for n in range(TOKENS)]


def prompts(rows, metric="logit_diff"):
    """Rows of (clean, corrupt, answers, wrong)."""
    clean, corrupt, answers, wrong = zip(*rows, strict=True)
    count, length = len(rows), len(clean[0])
    return Prompts(
        name="planted",
        metric=metric,
        clean=torch.tensor(clean),
        corrupt=torch.tensor(corrupt),
        last=torch.full((count,), length - 1),
        answers=tuple(answers),
        wrong=tuple(wrong),
        template=(0,) * count,
        texts=(("", ""),) * count,
    )


def copy():
    """The token at place 1 is said again."""
    made = Planted()
    made.look_at_place(0, 1, 1, read="token")
    rows = [([0, x, 5, 6], [0, y, 4, 3], (x,), (y,)) for x, y in ((1, 2), (2, 3), (3, 1), (4, 6))]
    return made.model, prompts(rows), {"input->a0.h1<v>", "a0.h1->logits"}


def induction():
    """A B ... A -> B: a previous-token head, and a head that looks for what followed."""
    made = Planted(layers=2)
    query, key, _ = made.head(0, 0, read="token", write="mark")
    for place in range(1, PLACES):
        made.at("place", query)[place, place] = SHARP
        made.at("place", key)[place - 1, place] = 1
    query, key, _ = made.head(1, 2, read="token")
    made.at("token", query)[:, :TOKENS].copy_(SHARP * torch.eye(TOKENS))
    made.at("mark", key)[:, :TOKENS].copy_(torch.eye(TOKENS))
    rows = [
        ([0, a, b, 7, a], [0, c, d, 7, e], (b,), (d,))
        for a, b, c, d, e in ((1, 2, 3, 4, 5), (3, 5, 1, 6, 2), (6, 4, 5, 2, 1))
    ]
    truth = {"input->a0.h0<v>", "a0.h0->a1.h2<k>", "input->a1.h2<q>", "input->a1.h2<v>", "a1.h2->logits"}
    return made.model, prompts(rows), truth


def greater_than():
    """A head brings the year at place 1, the MLP raises all greater ones."""
    made = Planted()
    made.look_at_place(0, 2, 1, read="token", write="mark")
    made.mlp(0, [("mark", one_hot(y), 0, [2.0 * (n > y) for n in range(TOKENS)]) for y in range(TOKENS)])
    rows = [([0, y, 3, 2], [0, 0, 5, 1], range(y + 1, TOKENS), range(y + 1)) for y in (2, 3, 4, 5)]
    rows = [(a, b, tuple(c), tuple(d)) for a, b, c, d in rows]
    return made.model, prompts(rows, "prob_diff"), {"input->a0.h2<v>", "a0.h2->m0", "m0->logits"}


def either():
    """Two heads bring the same sign from two places; the MLP says yes if one or both do (no more for both)."""
    made = Planted()
    made.look_at_place(0, 0, 1, read="token", write="mark", only=[1])
    made.look_at_place(0, 2, 2, read="token", write="mark", only=[1])
    made.mlp(0, [("mark", one_hot(1), 0, one_hot(3)), ("mark", one_hot(1), 1, one_hot(3, -1.0))])
    rows = [([0, 1, 1, n], [0, 2, 2, n], (3,), (4,)) for n in (5, 6)]
    paths = {f"{edge}" for h in (0, 2) for edge in (f"input->a0.h{h}<v>", f"a0.h{h}->m0")}
    return made.model, prompts(rows), paths | {"m0->logits"}


def backup():
    """A head says the token at place 1; a later one, a fifth as loud, says it aloud where the first is silent.

    When the first has spoken, the second looks at place 0. (A backup that is silent in both runs would write the
    same in both: no attribution by differences can see it.)
    """
    made = Planted(layers=2)
    made.look_at_place(0, 0, 1, read="token", only=range(1, 6))
    query, key, query_bias = made.head(1, 1, read="token", only=range(1, 6))
    made.at("out", query)[:, 0] = 0.64 * SHARP
    query_bias[1] = SHARP / 2
    made.at("place", key)[0, 0] = made.at("place", key)[1, 1] = 1
    rows = [([0, x, 6], [0, 7, 6], (x,), (7,)) for x in (1, 2, 3, 4)]
    truth = {"input->a0.h0<v>", "a0.h0->logits", "a0.h0->a1.h1<q>", "input->a1.h1<v>", "a1.h1->logits"}
    return made.model, prompts(rows), truth


def brackets():
    """A head counts brackets by attending to all alike; the MLP says how far from balance they are, either way."""
    made = Planted()
    made.head(0, 1, read="token", write="mark", only=[])
    value = made.model.transformer.h[0].attn.c_attn.weight[:, 2 * WIDTH + SIZE : 2 * WIDTH + 2 * SIZE]
    made.at("token", value)[1, 0], made.at("token", value)[2, 0] = 1, -1
    made.mlp(0, [("mark", one_hot(0, sign), 0, one_hot(3)) for sign in (1.0, -1.0)])
    rows = [([0, 1, 1, 1, 1], [0, 1, 2, 1, 2], (3,), (4,)), ([0, 2, 2, 2, 1], [0, 2, 1, 2, 1], (3,), (4,))]
    rows += [([0, 1, 1, 2, 1], [0, 1, 1, 2, 2], (3,), (4,))]
    return made.model, prompts(rows), {"input->a0.h1<v>", "a0.h1->m0", "m0->logits"}


CIRCUITS = {f.__name__: f for f in (copy, induction, greater_than, either, backup, brackets)}
