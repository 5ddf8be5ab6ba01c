"""What a model can do, by one protocol for dense, control and sparse alike.

Cross-entropy, perplexity and KL on a token stream; minimal pairs; attention edges. The protocol is part of every
result: tokens scored, window T, stride. With stride = window each window is scored whole from an empty context;
with a smaller stride only the last `stride` tokens of each window are scored, each with at least T - stride of
context.

Shapes: B batch, T token, L layer, H head, V vocabulary.
"""

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fewedges.data.batch import Batch
from fewedges.errors import DataError
from fewedges.model.attention import has_patterns
from fewedges.sparsify.attention.interface import GatePass, is_gated
from fewedges.sparsify.attention.serving import hard_kernel
from fewedges.sparsify.distilling import losses


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How text is cut and scored; printed beside every number."""

    context_length: int = 512
    """T: tokens per window."""
    stride: int | None = None
    """Tokens scored per window after the first; None: the whole window."""
    max_tokens: int | None = None
    """Read at most this many tokens of the file."""
    batch_size: int = 8
    """Windows per forward pass; does not change any result."""
    precision: str = "fp32"
    """fp32 or bf16 arithmetic."""
    kernel: str = "reference"
    """What runs gated attention: `reference`, or `hard`, the inference kernel (GPU)."""

    def __post_init__(self) -> None:
        stride = self.context_length if self.stride is None else self.stride
        if self.context_length < 2 or not 1 <= stride <= self.context_length:
            found = f"context_length {self.context_length}, stride {self.stride}"
            raise DataError("protocol", found, "context_length >= 2 and 1 <= stride <= context_length")
        if self.batch_size < 1 or (self.max_tokens is not None and self.max_tokens < 1):
            found = f"batch_size {self.batch_size}, max_tokens {self.max_tokens}"
            raise DataError("protocol", found, "batch_size and max_tokens of at least 1")
        if self.precision not in ("fp32", "bf16"):
            raise DataError("protocol", f"precision {self.precision!r}", "fp32 or bf16")
        if self.kernel not in ("reference", "hard"):
            raise DataError("protocol", f"kernel {self.kernel!r}", "reference or hard")


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Sums over a text, in nats; means are properties."""

    tokens: int
    cross_entropy: float
    kl: float
    """KL(dense || this model), mean per scored token."""
    edges: Float[Tensor, "L H"] | None
    """Mean open gates per query, or keys that a fixed pattern keeps; None for a model without either."""
    context_length: int

    @property
    def perplexity(self) -> float:
        """exp(cross-entropy)."""
        return math.exp(self.cross_entropy)

    @property
    def edges_per_query_per_head(self) -> float:
        """Open gates (or kept keys) per query, meaned over layers and heads; (T + 1) / 2 without gates or patterns."""
        return dense_edges(self.context_length) if self.edges is None else float(self.edges.mean())

    @property
    def density(self) -> float:
        """Fraction of the causal triangle, diagonal included, that is open."""
        return self.edges_per_query_per_head / dense_edges(self.context_length)


def dense_edges(context_length: int) -> float:
    """Edges per query per head when every gate is open: the mean row of the causal triangle."""
    return (context_length + 1) / 2


def score_tokens(model: Any, dense: Any, batches: Iterable[Batch], protocol: Protocol) -> Quality:
    """Score a model on windows of tokens (see `windows_of`), beside the dense model."""
    return score_models({"model": model}, dense, batches, protocol)["model"]


def score_models(
    models: dict[str, Any], dense: Any, batches: Iterable[Batch], protocol: Protocol
) -> dict[str, Quality]:
    """Score several models on the same windows; the dense model runs once for all of them.

    Edges are averaged over the queries of whole windows, whatever the stride, so that they belong to one T.
    """
    tallies = {label: _Tally() for label in models}
    with torch.no_grad():
        for batch in batches:
            reference, counted = _run(dense, batch, protocol)
            for label, model in models.items():
                logits, run = (reference, counted) if model is dense else _run(model, batch, protocol)
                tallies[label].add_(logits, reference, batch, run)
    return {label: tally.mean(protocol.context_length) for label, tally in tallies.items()}


@dataclass
class _Tally:
    """Sums over batches."""

    cross_entropy: float = 0.0
    kl: float = 0.0
    tokens: int = 0
    windows: int = 0
    edges: Tensor | None = None

    def add_(self, logits: Tensor, reference: Tensor, batch: Batch, run: GatePass) -> None:
        device = logits.device
        found = losses(logits, reference, batch.tokens.to(device), batch.counts.to(device))
        count = int(batch.counts[:, 1:].sum())
        self.cross_entropy += float(found.cross_entropy) * count
        self.kl += float(found.kl) * count
        self.tokens, self.windows = self.tokens + count, self.windows + len(batch.tokens)
        if run.open:
            opened = run.open_edges().double().mean(-1).sum(1).cpu()  # (L, H)
            self.edges = opened if self.edges is None else self.edges + opened

    def mean(self, context_length: int) -> Quality:
        edges = None if self.edges is None else (self.edges / self.windows).float()
        means = {"cross_entropy": self.cross_entropy / self.tokens, "kl": self.kl / self.tokens}
        return Quality(tokens=self.tokens, edges=edges, context_length=context_length, **means)


def _run(model: Any, batch: Batch, protocol: Protocol) -> tuple[Float[Tensor, "B T V"], GatePass]:
    """Logits, and what gates or fixed patterns let through (nothing is noted of other models)."""
    tokens, run, gated = batch.tokens.to(model.device), GatePass(), is_gated(model)
    options = {"gate_pass": run} if gated or has_patterns(model) else {}
    autocast = torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=protocol.precision == "bf16")
    with autocast, hard_kernel(model) if gated and protocol.kernel == "hard" else nullcontext():
        return model(input_ids=tokens, use_cache=False, **options).logits, run


def windows_of(stream: np.ndarray, protocol: Protocol) -> Iterator[Batch]:
    """Cut a stream into batches of windows and say which tokens each window scores."""
    length, stride = protocol.context_length, protocol.stride or protocol.context_length
    ids = np.asarray(stream[: protocol.max_tokens], dtype=np.int64)
    if len(ids) < length:
        raise DataError("text to measure", f"{len(ids)} tokens, one window is {length}", "a smaller --context-length")
    starts = range(0, len(ids) - length + 1, stride)
    for first in range(0, len(starts), protocol.batch_size):
        batch = starts[first : first + protocol.batch_size]
        tokens = torch.from_numpy(np.stack([ids[start : start + length] for start in batch]))
        counts = torch.zeros_like(tokens, dtype=torch.bool)
        for row, start in enumerate(batch):
            counts[row, (1 if start == 0 else length - stride) :] = True
        counts[:, 0] = False
        yield Batch(tokens, counts)


# -- minimal pairs ---------------------------------------------------------------------------------------------


def read_pairs(path: Path | str) -> list[dict[str, str]]:
    """Read a jsonl of {"good": ..., "bad": ..., "paradigm": ...}; every bad line is an error with its number."""
    pairs = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"minimal pairs {path}", str(error), "a UTF-8 jsonl file") from error
    for number, line in enumerate(lines, 1):
        try:
            given = json.loads(line)
            pair = {"paradigm": given.get("paradigm", "all"), "good": given["good"], "bad": given["bad"]}
            if not all(isinstance(x, str) for x in pair.values()):
                raise ValueError("not text")
            pairs.append(pair)
        except (ValueError, KeyError, AttributeError) as error:
            hint = '{"good": "...", "bad": "...", "paradigm": "..."}'
            raise DataError(f"minimal pairs {path} line {number}", "no json object with good and bad", hint) from error
    if not pairs:
        raise DataError(f"minimal pairs {path}", "it is empty", "a jsonl file with at least one pair")
    return pairs


def minimal_pairs(model: Any, tokenizer: Any, pairs: list[dict[str, str]], batch_size: int = 32) -> dict[str, float]:
    """Fraction of pairs whose good sentence is the more probable one, by paradigm and over `all`.

    A sentence's score is the sum of log-probabilities of its tokens after a beginning-of-text token, as in BLiMP
    (Warstadt et al. 2020). Chance is 0.5; a tie counts half.
    """
    scores = {kind: sentence_scores(model, tokenizer, [p[kind] for p in pairs], batch_size) for kind in ("good", "bad")}
    wins = [float(g > b) + 0.5 * float(g == b) for g, b in zip(scores["good"], scores["bad"], strict=True)]
    names = sorted({pair["paradigm"] for pair in pairs})
    of = {name: [w for w, pair in zip(wins, pairs, strict=True) if pair["paradigm"] == name] for name in names}
    return {"all": sum(wins) / len(wins)} | {name: sum(w) / len(w) for name, w in of.items() if name != "all"}


def sentence_scores(model: Any, tokenizer: Any, sentences: list[str], batch_size: int = 32) -> list[float]:
    """Log-probability of each sentence in nats, right-padded batches, longest first."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    head = [] if start is None else [start]
    ids = [head + tokenizer(s, add_special_tokens=False)["input_ids"] for s in sentences]
    if short := [s for s, x in zip(sentences, ids, strict=True) if len(x) < 2]:
        raise DataError(f"sentence {short[0]!r}", "fewer than two tokens", "whole sentences")
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    scores = [0.0] * len(ids)
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        for row, score in zip(rows, _batch_scores(model, [ids[i] for i in rows]), strict=True):
            scores[row] = score
    return scores


@torch.no_grad()
def _batch_scores(model: Any, ids: list[list[int]]) -> list[float]:
    length = max(map(len, ids))
    mask = torch.tensor([[1] * len(x) + [0] * (length - len(x)) for x in ids], device=model.device)
    tokens = torch.tensor([x + [0] * (length - len(x)) for x in ids], device=model.device)  # (B, T)
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    log_p = torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None])[..., 0]  # (B, T - 1)
    return (log_p.double() * mask[:, 1:]).sum(-1).tolist()
