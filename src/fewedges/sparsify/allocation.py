"""How a budget is shared over matrices: every rule gives one density a matrix, and the whole meets the budget.

`global` is not here: there the scores decide (select.select_global). Shapes: R outputs, C inputs.
"""

import math
import re
from collections.abc import Mapping, Sequence

from fewedges.errors import RecipeError

Shape = tuple[int, int]
"""(R, C) of a matrix."""


def shares(rule: str, shapes: Mapping[str, Shape], density: float, price: Sequence[str] = ()) -> dict[str, float]:
    """The density of each matrix by a rule's name: uniform, erk, or cost, at prices such as down_proj=2."""
    if (rule == "cost") != bool(price):
        found = f"allocation {rule}, price {list(price)}"
        raise RecipeError("recipe field price", found, "prices with allocation cost (at equal ones it is uniform) only")
    if rule == "cost":
        return by_cost(shapes, density, prices(shapes, price))
    return {"uniform": uniform, "erk": erk}[rule](shapes, density)


def prices(shapes: Mapping[str, Shape], given: Sequence[str]) -> dict[str, float]:
    """The price of an entry of each matrix, by endings of names ("down_proj=2"; a later one wins); of others 1."""
    found = dict.fromkeys(shapes, 1.0)
    for text in given:
        ending, _, number = text.rpartition("=")
        names = [name for name in shapes if ending and name.endswith(ending)]
        if not names or not re.fullmatch(r"\d*\.?\d+", number) or float(number) == 0:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in shapes}))
            raise RecipeError(
                f"recipe field price {text!r}", "no name and number above 0", f"such as down_proj=2: {ends}"
            )
        found.update(dict.fromkeys(names, float(number)))
    return found


def uniform(shapes: Mapping[str, Shape], density: float) -> dict[str, float]:
    """Every matrix alike."""
    return dict.fromkeys(shapes, density)


def erk(shapes: Mapping[str, Shape], density: float) -> dict[str, float]:
    """Density in proportion to (R + C) / (R C), at most 1 (Erdos-Renyi; Mocanu 2018, Evci et al. 2020).

    A matrix that would pass 1 stays dense and the others share the rest, until none passes.
    """
    return share(shapes, {name: (r + c) / (r * c) for name, (r, c) in shapes.items()}, density)


def by_cost(shapes: Mapping[str, Shape], density: float, cost: Mapping[str, float]) -> dict[str, float]:
    """Spend a fraction `density` of the dense cost where an entry is cheap: density in proportion to cost^(-1/2).

    `cost` is the price of one kept entry of each matrix (bytes moved, FLOPs, seconds; any unit). This minimises
    sum of entries / density, the simplest convex stand-in for the error, at a fixed total cost; at equal prices it
    is `uniform`.
    """
    weights = {name: r * c * cost[name] for name, (r, c) in shapes.items()}
    return share(shapes, {name: cost[name] ** -0.5 for name in shapes}, density, weights)


def share(
    shapes: Mapping[str, Shape],
    raw: Mapping[str, float],
    density: float,
    weights: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Densities in proportion to `raw`, capped at 1 and solved again, with their mean by `weights` (entries) met."""
    if not 0 < density <= 1 or not shapes:
        raise RecipeError(
            f"share density {density} over {len(shapes)} matrices", "nothing to share", "0 < density <= 1"
        )
    sizes = {name: float(math.prod(shape)) for name, shape in shapes.items()} if weights is None else dict(weights)
    budget, full = density * sum(sizes.values()), set()
    while True:
        rest = [name for name in shapes if name not in full]
        left = budget - sum(sizes[name] for name in full)
        scale = left / sum(raw[name] * sizes[name] for name in rest) if rest else 0.0
        over = {name for name in rest if scale * raw[name] > 1}
        if not over:
            return {name: 1.0 if name in full else scale * raw[name] for name in shapes}
        full |= over
