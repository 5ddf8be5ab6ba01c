"""What a picture of attention shows: the weights and open gates of one model on one prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from fewedges.errors import DataError

ROUNDING = 0.01  # a bfloat16 softmax may come out this much above 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Panel:
    """One model on one prompt: L layers, H heads, T tokens; axis 2 is the query, axis 3 the key.

    Raises DataError if shapes disagree, a gate above the diagonal is open, a weight at an open gate is not a
    number in [0, 1], or a weight at a closed gate is not 0.
    """

    title: str
    """Such as "dense" or "sparse"."""
    tokens: Sequence[str]
    """The T tokens as text."""
    weights: Float[np.ndarray, "L H T T"]
    """Attention weight after the gate: 0 where the gate is closed. Rows may sum to less than 1."""
    open: Bool[np.ndarray, "L H T T"]
    """Is the gate open? In a dense model: every causal entry."""
    caption: str = ""
    """A short line under the title, such as "5.50 edges per query per head"."""

    def __post_init__(self):
        object.__setattr__(self, "weights", np.asarray(self.weights))
        object.__setattr__(self, "open", np.asarray(self.open))
        object.__setattr__(self, "tokens", tuple(self.tokens))
        check_shapes(self)
        check_values(self)

    @property
    def edges(self) -> int:
        """The number of attention edges: open gates over all layers and heads."""
        return int(self.open.sum())


def panels(maps: Mapping[str, Any]) -> list[Panel]:
    """Return a panel for each model: `maps` is what `fewedges.attention` gives, label -> (tokens, weights, open)."""
    shown = []
    for label, (tokens, weights, opened) in maps.items():
        caption = f"{opened.sum(-1).mean():.2f} edges per query per head"
        shown.append(Panel(title=label, tokens=tokens, weights=weights, open=opened, caption=caption))
    return shown


def check_shapes(panel: Panel) -> None:
    """Raise DataError unless weights and open are (L, H, T, T) for T tokens."""
    asked = f"Panel({panel.title!r})"
    shape, tokens = panel.weights.shape, len(panel.tokens)
    if len(shape) != 4 or shape[2:] != (tokens, tokens) or 0 in shape:
        found = f"weights of shape {shape} for {tokens} tokens"
        raise DataError(asked, found, "weights of shape (layers, heads, tokens, tokens), none of them 0")
    if panel.open.shape != shape:
        raise DataError(asked, f"open {panel.open.shape}, weights {shape}", "the same shape for both")
    if panel.open.dtype != bool:
        raise DataError(asked, f"open has dtype {panel.open.dtype}", "a boolean array, such as gate > 0")
    strange = [token for token in panel.tokens if not isinstance(token, str)]
    if strange:
        raise DataError(asked, f"a token that is no text: {strange[0]!r}", "tokenizer.decode([id]) of each id")


def check_values(panel: Panel) -> None:
    """Raise DataError unless gates are causal and weights are in [0, 1], and 0 where closed."""
    asked = f"Panel({panel.title!r})"
    if np.triu(panel.open, k=1).any():
        raise DataError(asked, "an open gate whose key comes after its query", "axes (layer, head, query, key)")
    weights = panel.weights[panel.open]
    if not np.all((weights >= 0) & (weights <= 1 + ROUNDING)):  # NaN fails too
        found = f"weights from {weights.min():.3g} to {weights.max():.3g} at open gates"
        raise DataError(asked, found, "attention weights in [0, 1], after the softmax")
    if np.any(panel.weights[~panel.open] != 0):
        raise DataError(asked, "a weight other than 0 at a closed gate", "weights after the gate: weights * open")


def comparable(panels: Sequence[Panel]) -> list[Panel]:
    """Return the panels as a list. DataError unless all show the same tokens, layers and heads."""
    panels = list(panels)
    if not panels:
        raise DataError("a picture of panels", "no panel", "at least one Panel")
    for panel in panels[1:]:
        if panel.weights.shape != panels[0].weights.shape or panel.tokens != panels[0].tokens:
            found = f"{panels[0].title!r} {panels[0].weights.shape} and {panel.title!r} {panel.weights.shape}"
            hint = "the same prompt, and models with the same layers and heads"
            raise DataError("panels side by side", f"{found}, or other tokens", hint)
    return panels
