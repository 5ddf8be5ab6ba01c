"""SLIDE's hash functions and tables against loops written from the papers, and recall against its formula."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import slow_tables

from fewedges.sparsify.slide_hash import ATTEMPTS, Functions, Hashing, Tables

KINDS = ["simhash", "wta", "dwta"]


def slow_codes(functions, x):
    """Code by code, from the papers."""
    kind, count = functions.hashing.kind, functions.hashing.codes * functions.hashing.tables
    rows = []
    for v in x.tolist():
        if kind == "simhash":
            row = [int(sum(a * b for a, b in zip(v, p, strict=True)) >= 0) for p in functions.projection.T.tolist()]
        else:
            bins = [[v[c] for c in at] for at in functions.coordinates.tolist()]
            if kind == "wta":
                row = [max(range(len(b)), key=lambda i: b[i]) for b in bins]
            else:
                own = [max((i for i in range(len(b)) if b[i]), key=lambda i: b[i], default=None) for b in bins]
                row = list(own)
                for c in range(count):
                    asks = (own[int(functions.others[t, c])] for t in range(ATTEMPTS))
                    row[c] = own[c] if own[c] is not None else next((o for o in asks if o is not None), 0)
        rows.append(row)
    return torch.tensor(rows).view(len(x), functions.hashing.tables, functions.hashing.codes)


@pytest.mark.matches
@pytest.mark.parametrize("kind", KINDS)
def test_codes_and_keys_are_those_of_the_papers(kind):
    torch.manual_seed(0)
    x = torch.randn(20, 30)
    x[::2] *= torch.rand(10, 30) < 0.1  # sparse ones: bins run empty
    x[0] = 0
    functions = Functions(Hashing(kind=kind, codes=3, tables=4, bin=4), 30, seed=2)
    mine, slow = functions.codes(x), slow_codes(functions, x)
    assert torch.equal(mine, slow)
    base = 2 if kind == "simhash" else 4
    assert torch.equal(functions.keys(x), slow[..., 0] + base * slow[..., 1] + base**2 * slow[..., 2])
    assert functions.keys(x).max() < functions.hashing.keys == base**3
    if kind == "simhash":
        assert (functions.projection != 0).sum(0).tolist() == [10] * 12  # a third of the coordinates


@pytest.mark.matches
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(1, 40), st.integers(1, 4), st.integers(1, 6), st.integers(1, 5))
def test_tables_find_what_dictionaries_of_lists_do(seed, neurons, tables, buckets, capacity):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(0, buckets, (neurons, tables), generator=generator)
    asked = torch.randint(0, buckets + 1, (5, tables), generator=generator)
    slow, wanted = slow_tables(keys, capacity), {}
    for vector, line in enumerate(asked.tolist()):
        for table, key in zip(slow, line, strict=True):
            for neuron in table.get(key, []):
                wanted[vector, neuron] = wanted.get((vector, neuron), 0) + 1
    found = [part.tolist() for part in Tables.of(keys, capacity).find(asked)]
    assert {(v, n): c for v, n, c in zip(*found, strict=True)} == wanted
    assert sorted(zip(found[0], found[1], strict=True)) == list(zip(found[0], found[1], strict=True))


@pytest.mark.matches
@pytest.mark.parametrize(("angle", "codes", "tables"), [(0.3, 6, 5), (0.8, 4, 10), (1.2, 2, 3)])
def test_recall_of_simhash_follows_1_minus_1_minus_p_to_the_k_to_the_l(angle, codes, tables):
    torch.manual_seed(0)
    x, other = torch.nn.functional.normalize(torch.randn(2, 4000, 90), dim=-1)
    other = torch.nn.functional.normalize(other - (other * x).sum(-1, keepdim=True) * x, dim=-1)
    near = math.cos(angle) * x + math.sin(angle) * other
    hits = []
    for seed in range(5):
        functions = Functions(Hashing(codes=codes, tables=tables), 90, seed)
        hits.append((functions.keys(x) == functions.keys(near)).any(-1).float().mean())
    p = 1 - angle / math.pi
    assert float(torch.stack(hits).mean()) == pytest.approx(1 - (1 - p**codes) ** tables, abs=0.0029)  # measured .0007


@pytest.mark.stays
@pytest.mark.parametrize("kind", ["wta", "dwta"])
def test_winner_take_all_looks_at_order_alone_and_dense_vectors_need_no_densifying(kind):
    torch.manual_seed(0)
    x = torch.randn(50, 32)
    functions = Functions(Hashing(kind=kind, codes=2, tables=8), 32)
    assert torch.equal(functions.keys(x), functions.keys(3 * x + 7 * (kind == "wta")))
    other = Functions(Hashing(kind="wta", codes=2, tables=8), 32)
    assert torch.equal(functions.keys(x), other.keys(x))


@pytest.mark.stays
def test_densifying_tells_sparse_vectors_apart():
    """Empty bins collide for all; borrowed ones only for vectors that are alike."""
    torch.manual_seed(0)
    x = torch.rand(300, 200) * (torch.rand(300, 200) < 0.03)
    alike = x * (1 + 0.1 * torch.rand_like(x))

    def met(kind, other):
        functions = Functions(Hashing(kind=kind, codes=2, tables=10), 200)
        return float((functions.keys(x) == functions.keys(other)).float().mean())

    assert met("wta", x.roll(1, 0)) > 0.3 > 0.15 > met("dwta", x.roll(1, 0))  # measured .40 and .03
    assert met("dwta", alike) > 0.8  # measured .998
