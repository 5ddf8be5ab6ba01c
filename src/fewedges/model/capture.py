"""Read attention out of a model: the weights of every layer for one prompt.

Shapes: L layer, H head, Q query, K key (Q = K = T).
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fewedges.errors import DataError
from fewedges.model.anatomy import plain
from fewedges.model.attention import attention_by, dense_attention, register

CAPTURE = "fewedges-capture"


class Maps(NamedTuple):
    """The attention of one prompt."""

    tokens: list[str]
    weights: np.ndarray
    """(L, H, T, T) attention weight after the gate."""
    open: np.ndarray
    """(L, H, T, T) which edges exist: the causal triangle for a dense model."""


def dense_maps(model: Any, tokenizer: Any, prompt: str) -> Maps:
    """Attention weights of a dense model on a prompt; every allowed edge counts as open."""
    ids, words = prompt_tokens(tokenizer, prompt, model.device)
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output, weights = dense_attention(module, *args, **kwargs)
        kept.append(weights[0].float().cpu())
        return output, None

    register(CAPTURE, keep)
    with torch.no_grad(), attention_by(plain(model), CAPTURE):
        model(input_ids=ids, use_cache=False)
    weights = torch.stack(kept).numpy()
    allowed = np.tril(np.ones(weights.shape[-2:], dtype=bool))
    return Maps(words, weights, (weights > 0) & allowed)


def prompt_tokens(tokenizer: Any, prompt: str, device: Any) -> tuple[torch.Tensor, list[str]]:
    """Token ids (1, T) and their texts; an empty prompt is an error."""
    try:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
    except Exception as error:  # the tokenizers package raises Exception itself
        found = f"the tokenizer cannot write it as tokens ({error})"
        raise DataError(f"prompt {prompt!r}", found, "text in the characters this model knows") from error
    if ids.numel() < 2:
        raise DataError(f"prompt {prompt!r}", f"{ids.numel()} tokens", "a prompt of at least two tokens")
    return ids, [tokenizer.decode([int(i)]) for i in ids[0]]
