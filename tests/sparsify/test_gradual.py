"""Gradual pruning: the mask follows the schedule, only ever grows, and takes the smallest weights."""

import pytest
import torch

from fewedges.sparsify.gradual import gradually
from fewedges.sparsify.matrices import matrices_of
from fewedges.sparsify.schedule import Cubic
from fewedges.sparsify.select import kept_units
from tiny import NoiseBatches, tiny_loaded


@pytest.mark.matches
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_mask_follows_the_schedule_and_takes_the_smallest(name):
    loaded = tiny_loaded(name)
    model, matrices = loaded.model.requires_grad_(True), matrices_of(loaded)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule, changes = Cubic(density=0.2, start=1, end=7, every=2), []
    with gradually(model, matrices, optimizer, schedule) as pruner:
        for step in range(10):
            tokens = NoiseBatches().at(step, 2).tokens
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            before = {path: (matrix.weight.clone(), pruner.guard.kept[path]) for path, matrix in matrices.items()}
            if not pruner.prune_(step):
                continue
            changes.append(step)
            for path, (weight, kept) in before.items():
                now = pruner.guard.kept[path]
                assert not (now & ~kept).any()
                assert int(now.sum()) == kept_units(now.numel(), schedule.at(step).density)
                assert weight[now].abs().min() >= weight[kept & ~now].abs().max()
    assert changes == [3, 5, 7]  # step 1 asks for density 1
    masks = pruner.guard.masks()
    assert masks.density == pytest.approx(0.2, abs=1e-3)  # each matrix rounds to whole entries
    masks.check(model)
