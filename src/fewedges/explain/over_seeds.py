"""One task explained in several runs that differ in their seed alone: ratios, lines and bands over seeds and prompts.

A run may also have started elsewhere, from what another seed had made: the weights are free, the measurement is not.

A bootstrap draw takes as many runs as there are, and as many prompts, both with replacement, and the same prompts for
every run and for the dense model. With few runs the interval says more of prompts than of seeds: of two, half of the
draws take one run twice; of three, two in nine take each once.

Shapes: K circuit.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Real

from fewedges.errors import DataError
from fewedges.explain.circuit import Curve
from fewedges.explain.explaining import Explained, times_fewer

SHARE = (0.025, 0.975)
OWN = ("controls", "complements", "memory", "samples", "versions", "device", "manifest", "graphs", "exported")
"""Facts that may differ from run to run; of the others, those that both name must be the same."""


def ratio_over_seeds(
    runs: Sequence[Explained], count: str = "edges", level: float = 0.9, label: str = "sparse"
) -> tuple[float, float, float]:
    """How many times fewer edges (or heads) than in the dense model, the geometric mean of the runs; and its interval.

    A run that never gets there makes it 0. DataError where the runs were not measured alike.
    """
    check_alike(runs)
    dense, others = runs[0].curves["dense"], [run.curves[label] for run in runs]
    draw = np.random.default_rng(runs[0].facts.get("seed", 0))
    found = []
    for _ in range(runs[0].facts.get("samples", 1000)):
        prompts = draw.integers(len(dense.full), size=len(dense.full))
        drawn = [others[i].of(prompts) for i in draw.integers(len(others), size=len(others))]
        found.append(_mean_ratio(dense.of(prompts), drawn, count, level))
    known = np.nan_to_num(np.array(found), nan=1.0, posinf=np.inf)  # neither model gets there: no gain
    low, high = np.quantile(known, SHARE, method="nearest")
    return _mean_ratio(dense, others, count, level), float(low), float(high)


def line(curves: Sequence[Curve], count: str = "edges") -> Float[np.ndarray, "K"]:
    """The explained effect at the first curve's sizes, the mean over runs."""
    sizes = getattr(curves[0], count)
    return np.mean([_effect_at(curve, count, sizes) for curve in curves], axis=0)


def crossing(curves: Sequence[Curve], count: str = "edges", level: float = 0.9) -> float:
    """Where runs reach the level: geometric mean of their sizes there, none counted as one; inf if one never does."""
    sizes = [getattr(curve, f"{count}_at")(level) for curve in curves]
    return math.exp(sum(math.log(max(size, 1.0)) for size in sizes) / len(sizes))


def band(
    curves: Sequence[Curve], count: str = "edges", samples: int = 500
) -> tuple[Float[np.ndarray, "K"], Float[np.ndarray, "K"]]:
    """The 95 % interval of the explained effect at the first curve's sizes, of one run or over several.

    Another run's circuits have other sizes: its effect is read between them, straight over the logarithm of the size.
    """
    prompts, sizes = len(curves[0].full), getattr(curves[0], count)
    draw = np.random.default_rng(0)
    rows = draw.integers(prompts, size=(samples, prompts))
    which = draw.integers(len(curves), size=(samples, len(curves)))
    found = [
        np.mean([_effect_at(curves[i].of(some), count, sizes) for i in drawn], axis=0)
        for some, drawn in zip(rows, which, strict=True)
    ]
    low, high = np.quantile(np.stack(found), SHARE, axis=0)
    return low, high


def check_alike(runs: Sequence[Explained]) -> None:
    """DataError unless there are runs, of one task, the same prompts and the same search."""
    if not runs:
        raise DataError("runs over seeds", "none", "at least one result of `fewedges explain`")
    first = runs[0]
    for other in runs[1:]:
        named = sorted(first.facts.keys() & other.facts.keys() - set(OWN))
        changed = [name for name in named if first.facts[name] != other.facts[name]]
        changed += [name for name in ("task", "model") if getattr(first, name) != getattr(other, name)]
        dense = [run.curves["dense"].full for run in (first, other)]
        changed += ["what the dense model does"] * (
            len(dense[0]) != len(dense[1]) or not np.allclose(*dense, rtol=1e-3)
        )
        if changed:
            found = f"they differ in {', '.join(changed)}"
            raise DataError(f"{first.task} over {len(runs)} runs", found, "runs that differ in their seed alone")


def _mean_ratio(dense: Curve, others: Sequence[Curve], count: str, level: float) -> float:
    ratios = [times_fewer(dense, other, count, level) for other in others]
    if 0 in ratios:
        return 0.0
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _effect_at(curve: Curve, count: str, sizes: Real[np.ndarray, "K"]) -> Float[np.ndarray, "K"]:
    own = getattr(curve, count)
    if np.array_equal(own, sizes):
        return curve.explained
    return np.interp(np.log(np.maximum(sizes, 0.5)), np.log(np.maximum(own, 0.5)), curve.explained)
