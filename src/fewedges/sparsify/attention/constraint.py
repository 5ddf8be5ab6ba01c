"""The multiplier's law: the price of an edge rises while the constraint holds and falls while it is broken.

Source: GECO (Rezende and Viola 2018, arXiv:1810.00597), which minimises an objective subject to an error staying
under a bound by moving a Lagrange multiplier exponentially with a running mean of the violation. GECO puts the
multiplier on the error; we put its inverse, the price, on the edges. Two things differ: the violation is clipped
to +-1 in units of `width`, so that one bad batch cannot move the price by more than `rate`; and with several
constraints the most violated one drives the price. Two options use s, the fall of the learning rate from 1 to 0 at
the end of training: `slack` widens the margin while steps are large and noisy, and `cooling` multiplies the price by
s, so that no gate closes when nothing can be repaired any more. Both are ours; results/addition-tried says how they
came about, and that neither was tested by itself in this loop.

    violation = max over constraints of (value - margin - slack * s)
              = 10 width * log(target / edges) where the recipe turns it around: so many edges at the least loss
              = 10 width * log(target / open heads) for the price of heads, where the recipe has one
    mean      = smoothing * mean + (1 - smoothing) * violation        (the first value starts it)
    log price = log price - rate * clip(mean / width, -1, 1)
"""

import math
from dataclasses import asdict, dataclass

from fewedges.recipes import SparseAttention


@dataclass
class Multiplier:
    """A price in nats (of one attention edge per query per head; of open heads) and the running mean that moves it."""

    price: float
    mean: float | None = None

    def update_(
        self, recipe: SparseAttention, kl: float, excess_loss: float, fall: float = 1.0, edges: float = math.nan
    ) -> None:
        """Move the price after a step whose batch had this KL, this cross-entropy above dense, and these edges."""
        if recipe.target_edges is None:
            now = violation(recipe, kl, excess_loss) - recipe.slack * fall
        else:
            now = _shortage(recipe, recipe.target_edges, edges)
        self._move_(recipe, now)

    def towards_(self, recipe: SparseAttention, target: float, found: float) -> None:
        """Move a price after a step that found so many of what it prices; more than the target, and it rises."""
        self._move_(recipe, _shortage(recipe, target, found))

    def _move_(self, recipe: SparseAttention, now: float) -> None:
        self.mean = now if self.mean is None else recipe.smoothing * self.mean + (1 - recipe.smoothing) * now
        pull = max(-1.0, min(1.0, self.mean / recipe.multiplier_width))
        self.price *= math.exp(-recipe.multiplier_rate * pull)

    def state(self) -> dict[str, float | None]:
        """Plain data; floats survive json exactly."""
        return asdict(self)


def _shortage(recipe: SparseAttention, target: float, found: float) -> float:
    """How far what was found is below its target, as a violation: a tenth of the target away is one width."""
    return 10 * recipe.multiplier_width * math.log(target / max(found, 1e-9))


def violation(recipe: SparseAttention, kl: float, excess_loss: float) -> float:
    """How far the most violated constraint is past its margin, in nats per token; negative when all hold."""
    pairs = ((kl, recipe.kl_margin), (excess_loss, recipe.loss_margin))
    return max(value - margin for value, margin in pairs if margin is not None)
