"""Make a transformer sparse without losing what it can do, and see what that buys.

    import fewedges as fe
    dense = fe.load("addition")
    sparse = fe.sparsify(dense, fe.SparseAttention(steps=500))
    print(fe.measure(sparse))

Names are imported when first used, so that `import fewedges` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewedges.explain.explaining import explain as explain
    from fewedges.measure.ledger import measure as measure
    from fewedges.sparsify.stages import sparsify as sparsify

__version__ = "0.1.0"

_HOME = {
    "load": "sparsify.attention.result",
    "Sparse": "sparsify.attention.result",
    "post_train": "sparsify.attention.training",
    "attach_": "sparsify.attention.interface",
    "attend_": "sparsify.attending",
    "pixelate_": "sparsify.pixelate",
    "GatePass": "sparsify.attention.interface",
    "hard_kernel": "sparsify.attention.serving",
    "gated_attention": "sparsify.attention.gate",
    "SparseAttention": "recipes",
    "CircuitSearch": "recipes",
    "Prune": "weight_recipes",
    "Quantize": "weight_recipes",
    "Distil": "weight_recipes",
    "Train": "weight_recipes",
    "Rewire": "weight_recipes",
    "Gradual": "weight_recipes",
    "Rewind": "weight_recipes",
    "Tickets": "weight_recipes",
    "Pruned": "sparsify.pruned",
    "Pattern": "sparsify.pattern",
    "by_blocks": "sparsify.blocked",
    "Explained": "explain.explaining",
    "read_recipe": "recipes",
    "Loaded": "model.loading",
    "get_smollm2": "model.loading",
    "anatomy": "model.anatomy",
    "read_text": "data.text",
    "Report": "measure.report",
    "Protocol": "measure.quality",
    "token_edges": "explain.positions",
    "TokenEdges": "explain.positions",
    "Hardware": "measure.hardware",
    "hardware": "measure.speed",
    "attention": "measure.attention",
    "Panel": "draw",
    "panels": "draw",
    "connectivity": "draw",
    "heads": "draw",
    "covered": "draw",
    "speedups": "draw",
    "training_curve": "draw",
    "save": "draw",
    "FewedgesError": "errors",
}

_STAGES = ("sparsify", "measure", "explain")  # packages that can be called

__all__ = sorted([*_HOME, *_STAGES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _STAGES:
        return importlib.import_module(f"fewedges.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'fewedges' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"fewedges.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
