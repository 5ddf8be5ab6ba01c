"""The attention of one prompt, in every model that is compared: plain arrays for the pictures."""

from fewedges.measure.report import models_of
from fewedges.model.capture import Maps, dense_maps
from fewedges.model.loading import Loaded
from fewedges.sparsify.attention.interface import gated_maps, is_gated
from fewedges.sparsify.attention.result import Sparse


def attention(what: Sparse | Loaded, prompt: str) -> dict[str, Maps]:
    """Attention weights and open edges of dense, control and sparse on a prompt."""
    found = {}
    for label, loaded in models_of(what).items():
        read = gated_maps if is_gated(loaded.model) else dense_maps
        found[label] = read(loaded.model, loaded.tokenizer, prompt)
    return found
