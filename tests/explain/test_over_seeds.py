"""One task in several runs: ratios and bands over seeds and prompts."""

from dataclasses import replace

import numpy as np
import pytest

from fewedges.errors import DataError
from fewedges.explain.circuit import Curve
from fewedges.explain.explaining import Explained
from fewedges.explain.over_seeds import band, check_alike, crossing, line, ratio_over_seeds


def curve(sizes, effects, prompts=6, spread=0.0, seed=0):
    """A curve of these sizes and effects; every prompt's metric is the effect and its own noise."""
    noise = np.random.default_rng(seed).normal(size=(len(sizes), prompts)) * spread
    metric = np.array(effects, dtype=float)[:, None] + noise * (np.array(effects)[:, None] < 1)
    same = {"kl": metric * 0, "correct": metric > 0.5, "full": np.ones(prompts), "empty": np.zeros(prompts)}
    counts = {name: np.array(sizes) for name in ("budgets", "edges", "heads", "mlps")}
    return Curve(all_edges=sizes[-1], ablation="mean", how="absolute", metric=metric, **same, **counts)


def run(at, spread=0.0, seed=0, **facts):
    """Dense reaches 0.9 at 1,000 of 10,000 edges, sparse at `at`."""
    curves = {
        "dense": curve((10, 1000, 10_000), (0.1, 0.9, 1.0), spread=spread),
        "sparse": curve((10, at, 10_000), (0.1, 0.9, 1.0), spread=spread, seed=seed),
    }
    facts = {"ablation": "mean", "samples": 60, "prompts": {"sha256": "1"}, **facts}
    return Explained(task="ioi", model="tiny", curves=curves, circuits={}, solved={}, facts=facts)


@pytest.mark.matches
def test_no_heads_count_as_one():
    """A draw of prompts may reach the level without a head: 1000 heads over none are 1000 times fewer, not 1e12."""
    none = replace(run(250).curves["sparse"], heads=np.array([0, 0, 5]))
    found = run(250)
    found.curves["sparse"] = none
    assert found.ratio("heads") == pytest.approx(1000)
    assert found.ratio_interval("heads") == pytest.approx((1000, 1000))
    assert ratio_over_seeds([found], "heads") == pytest.approx((1000, 1000, 1000))
    assert crossing([none], "heads") == pytest.approx(1)
    found.curves["dense"] = none
    assert found.ratio("heads") == 1


@pytest.mark.matches
def test_the_ratio_is_the_geometric_mean_of_the_runs():
    mean, low, high = ratio_over_seeds([run(250), run(100)])
    assert mean == pytest.approx((4 * 10) ** 0.5, rel=1e-12)
    # prompts are alike here, so a draw of two runs has one of three means, and the ends are those of one run twice
    assert (low, high) == pytest.approx((4, 10), rel=1e-12)
    assert ratio_over_seeds([run(250)]) == pytest.approx((4, 4, 4), rel=1e-12)
    assert ratio_over_seeds([run(250), run(100)], "heads", label="dense") == pytest.approx((1, 1, 1))


@pytest.mark.matches
def test_the_interval_is_a_slow_loops():
    runs = [run(300, 0.03, 1), run(120, 0.03, 2)]
    draw, found = np.random.default_rng(0), []
    for _ in range(60):
        rows = draw.integers(6, size=6)
        which = draw.integers(2, size=2)
        dense = runs[0].curves["dense"].of(rows).edges_at(0.9)
        found.append(np.prod([dense / runs[i].curves["sparse"].of(rows).edges_at(0.9) for i in which]) ** 0.5)
    _, low, high = ratio_over_seeds(runs)
    assert (low, high) == pytest.approx(tuple(np.quantile(found, [0.025, 0.975], method="nearest")), rel=1e-12)
    assert low < ratio_over_seeds(runs)[0] < high


@pytest.mark.matches
def test_a_band_of_one_run_is_the_bootstrap_of_its_prompts():
    one = curve((10, 100, 1000), (0.2, 0.7, 1.0), spread=0.1)
    rows = np.random.default_rng(0).integers(6, size=(500, 6))
    slow = np.quantile([one.metric[:, some].mean(1) for some in rows], [0.025, 0.975], axis=0)
    assert np.allclose(band([one]), slow, rtol=1e-12)
    assert (slow[1] - slow[0])[:2].min() > 0.05


@pytest.mark.matches
def test_a_band_over_runs_reads_another_run_between_its_sizes():
    first, second = curve((10, 100, 1000), (0.2, 0.7, 1.0)), curve((1, 100, 10_000), (0.0, 0.4, 1.0))
    low, high = band([first, second])
    # at 10: half-way from 1 to 100 in the logarithm; at 1,000: half-way from 100 to 10,000
    assert low == pytest.approx([0.2, 0.4, 0.7])
    assert high == pytest.approx([0.2, 0.7, 1.0])
    assert line([first, second]) == pytest.approx([0.2, 0.55, 0.85])


@pytest.mark.matches
def test_sizes_where_runs_reach_a_level_are_put_together_as_ratios_are():
    runs = [run(250), run(100)]
    at = crossing([one.curves["sparse"] for one in runs])
    assert at == pytest.approx(1000 / ratio_over_seeds(runs)[0], rel=1e-12)


@pytest.mark.survives
def test_a_run_that_never_reaches_the_level_leaves_a_ratio_of_nothing():
    never = replace(run(250), curves={**run(250).curves, "sparse": curve((10, 100, 1000), (0.1, 0.2, 0.3))})
    mean, low, high = ratio_over_seeds([never, run(250)])
    assert (mean, low) == (0, 0)
    assert high == pytest.approx(4, rel=1e-12)
    assert never.ratio_interval() == (0, 0)  # as one run says
    assert crossing([never.curves["sparse"], run(250).curves["sparse"]]) == float("inf")


@pytest.mark.says
@pytest.mark.parametrize(
    ("other", "what"),
    [
        (run(100, ablation="zero"), "ablation"),
        (run(100, gim=True), "gim"),
        (replace(run(100), model="other"), "model"),
        (
            replace(run(100), curves={**run(100).curves, "dense": curve((10, 1000), (0.5, 1.0), prompts=5)}),
            "what the dense",
        ),
        (run(100, prompts={"sha256": "2"}), "prompts"),
        (replace(run(100), task="docstring"), "task"),
    ],
)
def test_runs_that_were_not_measured_alike_are_refused(other, what):
    with pytest.raises(DataError, match=f"ioi over 2 runs.*differ in {what}.*seed alone"):
        check_alike([run(250, gim=False), other])
    check_alike([run(250), run(100, method="eap", samples=9)])  # the first does not say how it was found


@pytest.mark.says
def test_no_run_at_all_is_refused():
    with pytest.raises(DataError, match="none"):
        ratio_over_seeds([])
