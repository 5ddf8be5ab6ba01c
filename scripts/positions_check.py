"""How well the gradient of an attention edge agrees with closing it, on a real model and IOI.

    python scripts/positions_check.py results/smollm2/run > results/circuits/positions-check.log

Protocol: one prompt (seed 0); the 80 edges of the largest gradient and 300 drawn at random (seed 0) are closed one by
one; Pearson correlation r, and the share of the top 80 with the same sign. Then 16 prompts: the eight role edges of the
largest gradient, exact and by gradient, in nats of the logit difference. Dense: all causal edges.
"""

import sys

import numpy as np
import torch

import fewedges as fe
from fewedges import store
from fewedges.explain.tasks import prompts_for


def one_prompt(loaded, prompts):
    """Gradient against exact on the same edges of one prompt."""
    every = fe.token_edges(loaded, prompts)
    top = every.strongest(80)
    drawn = every.only(np.random.default_rng(0).choice(len(every), 300, replace=False))
    both = np.unique(np.concatenate([top.edges, drawn.edges]), axis=0)
    exact = fe.token_edges(loaded, prompts, "exact", edges=both).scores
    number = {tuple(edge): n for n, edge in enumerate(every.edges.tolist())}
    fast = every.scores[[number[tuple(edge)] for edge in both.tolist()]]
    strongest = {tuple(edge) for edge in top.edges.tolist()}
    first = np.array([tuple(edge) in strongest for edge in both.tolist()])
    r = {name: np.corrcoef(fast[some], exact[some])[0, 1] for name, some in (("top", first), ("rest", ~first))}
    sign = (np.sign(fast) == np.sign(exact))[first].mean()
    every_r = np.corrcoef(fast, exact)[0, 1]
    print(
        f"  {len(both)} edges: r {every_r:.3f}; top 80: r {r['top']:.3f}, same sign {sign:.2f}; rest: r {r['rest']:.3f}"
    )


def by_role(loaded, prompts):
    """The strongest role edges over several prompts, closed one by one."""
    every = fe.token_edges(loaded, prompts)
    best = {one[:3]: one.score for one in every.by_role()[:8]}
    names = [
        (f"a{layer}.h{head}", every.places[prompt][query], every.places[prompt][key])
        for prompt, layer, head, query, key in every.edges.tolist()
    ]
    rows = every.edges[[n for n, name in enumerate(names) if name in best]]
    for one in fe.token_edges(loaded, prompts, "exact", edges=rows).by_role():
        print(f"  {one}: exact {one.score:+.2f}, gradient {best[one[:3]]:+.2f}", flush=True)


def main():
    torch.set_num_threads(1)
    sparse = fe.load(sys.argv[1], probes=False)
    print(sys.argv[1], store.device_name("cpu"), store.versions())
    for label, loaded in (("sparse", sparse.loaded), ("dense", sparse.dense)):
        print(label, flush=True)
        one_prompt(loaded, prompts_for("ioi", sparse.tokenizer, 1))
        by_role(loaded, prompts_for("ioi", sparse.tokenizer, 16))


if __name__ == "__main__":
    main()
