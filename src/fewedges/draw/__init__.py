"""Show it: connectivity, attention maps, training curves. Needs numpy and matplotlib, never torch.

figure = connectivity([Panel(title="dense", ...), Panel(title="sparse", ...)])
save(figure, "runs/addition/connectivity")  # .svg and .png
"""

from fewedges.draw.circuit import CircuitPicture, circuits
from fewedges.draw.connectivity import connectivity
from fewedges.draw.covered import Covered, covered
from fewedges.draw.curve import Curve, Effects, explained_effect
from fewedges.draw.hardware import speedups
from fewedges.draw.heads import heads
from fewedges.draw.lines import training_curve
from fewedges.draw.panel import Panel, panels
from fewedges.draw.theme import THEMES, Theme, save
from fewedges.draw.training import races

__all__ = [
    "THEMES",
    "CircuitPicture",
    "Covered",
    "Curve",
    "Effects",
    "Panel",
    "Theme",
    "circuits",
    "connectivity",
    "covered",
    "explained_effect",
    "heads",
    "panels",
    "races",
    "save",
    "speedups",
    "training_curve",
]
