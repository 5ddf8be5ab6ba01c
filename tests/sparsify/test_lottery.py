"""Lottery tickets: the rounds, what is gone back to, and the controls."""

import pytest
import torch

from fewedges.errors import ModelError, RecipeError
from fewedges.sparsify.lottery import find_ticket, reinitialised_, smaller
from fewedges.sparsify.masks import held
from fewedges.sparsify.matrices import matrices_of
from fewedges.weight_recipes import Tickets
from tiny import NoiseBatches, tiny_loaded


def trainer(loaded, log):
    """A few steps of AdamW that follow the step number, as find_ticket asks."""

    def train(masks, first, last):
        log.append((masks.density, first, last, {n: p.clone() for n, p in loaded.model.named_parameters()}))
        model = loaded.model.requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with held(model, masks, optimizer):
            for step in range(first, last):
                tokens = NoiseBatches().at(step, 2).tokens
                loss = model(input_ids=tokens, labels=tokens).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return {"loss": float(loss.detach())} if last > first else None

    return train


@pytest.mark.matches
@pytest.mark.parametrize("rewind", [0, 2])
@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_every_round_prunes_the_smallest_and_goes_back(rewind, scope):
    loaded, log = tiny_loaded(), []
    recipe = Tickets(rounds=3, rate=0.25, rewind=rewind, steps=4, scope=scope)
    ticket = find_ticket(loaded, recipe, trainer(loaded, log))
    assert [(first, last) for _, first, last, _ in log] == [(0, rewind)] + [(rewind, 4)] * 4
    assert [row["density"] for row in ticket.rounds] == pytest.approx([1, 0.75, 0.5625, 0.4219], abs=2e-3)
    assert ticket.masks.density == pytest.approx(recipe.density, abs=2e-3)  # each matrix rounds to whole entries
    early = log[1][3]
    assert all(torch.equal(ticket.early[n], value) for n, value in early.items())
    for _, _, _, begun in log[2:]:
        for name, value in begun.items():
            kept = begun[name] != 0
            assert torch.equal(value[kept], early[name][kept])
    assert (log[0][3]["model.layers.0.mlp.up_proj.weight"] != early["model.layers.0.mlp.up_proj.weight"]).any() == (
        rewind > 0
    )
    assert "density 0.42" in str(ticket)


@pytest.mark.matches
def test_the_smallest_of_what_is_left_goes():
    loaded = tiny_loaded()
    matrices = matrices_of(loaded)
    from fewedges.sparsify.masks import Masks
    from fewedges.sparsify.pattern import dense

    masks = Masks({name: dense(matrix.shape) for name, matrix in matrices.items()})
    for scope in ("matrix", "global"):
        once = smaller(matrices, masks, 0.5, scope)
        twice = smaller(matrices, once, 0.5, scope)
        assert twice.density == pytest.approx(0.25, abs=1e-6)
        for name, matrix in matrices.items():
            kept, gone = twice.patterns[name].mask(), once.patterns[name].mask() & ~twice.patterns[name].mask()
            assert (twice.patterns[name] & once.patterns[name]).nnz == twice.patterns[name].nnz
            assert matrix.weight[kept].abs().min() >= matrix.weight[gone].abs().max()


@pytest.mark.survives
def test_a_trainer_that_ignores_the_masks_is_found_out():
    loaded = tiny_loaded()

    def careless(masks, first, last):
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                parameter.add_(1e-3)

    with pytest.raises(ModelError, match=r"zeros of .* are lost"):
        find_ticket(loaded, Tickets(rounds=1, steps=2), careless)


@pytest.mark.reproduces
def test_new_weights_come_from_the_seed_and_leave_the_generator_alone():
    loaded = tiny_loaded()
    old = loaded.model.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    state = torch.get_rng_state()
    found = []
    for seed in (1, 1, 2):
        reinitialised_(loaded.model, seed)
        found.append(loaded.model.state_dict()["model.layers.0.mlp.up_proj.weight"].clone())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], old)


@pytest.mark.survives
@pytest.mark.parametrize(("field", "value"), [("rounds", 0), ("rate", 1.0), ("rewind", 1000), ("scope", "row")])
def test_a_value_out_of_range_names_its_field(field, value):
    with pytest.raises(RecipeError, match=field):
        Tickets(**{field: value})
