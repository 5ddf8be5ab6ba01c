"""Wired tiny models, made once: reading only, every change to a model is undone by the code under test."""

import pytest


@pytest.fixture(scope="session")
def wired():
    """A function: tiny model name and options of `wire` -> Wiring in float64, cached."""
    from fewedges.explain.hooks import wire
    from fewedges.model.anatomy import anatomy
    from tiny import tiny_model

    made = {}

    def get(name, **options):
        key = (name, *sorted(options.items()))
        if key not in made:
            model = tiny_model(name).double()
            made[key] = wire(model, anatomy(model), **options)
        return made[key]

    return get
