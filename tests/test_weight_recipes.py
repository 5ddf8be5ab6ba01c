"""Recipes for weights: help under every field, ranges guarded, one or several through YAML."""

import ast
import dataclasses
import inspect
import itertools
import math

import pytest
import yaml

from fewedges import weight_recipes
from fewedges.errors import RecipeError
from fewedges.recipes import RECIPES, from_dict, read_recipe, to_dict, write_recipe
from fewedges.weight_recipes import (
    WEIGHT_RECIPES,
    Distil,
    Gradual,
    Prune,
    Quantize,
    Rewind,
    Rewire,
    Tickets,
    Train,
)

OUT_OF_RANGE = {
    "layers": ((1, 0), (0, 0), (-1,), (0.5,), 3, [0]),
    "kl_weight": (-1.0, math.nan, None, True),
    "loss_weight": (-1e-9, math.inf),
    "hidden_weight": (-0.1, "1"),
    "train": ("lora", None),
    "learning_rate": (0.0, -1e-4, "1e-4"),
    "adam_betas": ((0.9,), (0.9, 1.0), 0.9),
    "weight_decay": (-0.1, math.inf),
    "clip": (0.0, math.nan),
    "warmup_steps": (-1, 0.5),
    "decay_fraction": (-0.1, 1.1),
    "context_length": (1, 2.5),
    "batch_size": (0, 1.5),
    "micro_batch": (0, -1, 0.5),
    "steps": (0, 1.5, None),
    "precision": ("fp16", ""),
    "seed": (-1, None),
    "log_every": (0,),
    "checkpoint_every": (0, 2.5),
}


@pytest.mark.says
@pytest.mark.parametrize("name", WEIGHT_RECIPES)
def test_every_field_has_a_sentence_of_help_under_it(name):
    kind = WEIGHT_RECIPES[name]
    helped = {}
    for parent in reversed(kind.__mro__[:-1]):
        (body,) = [
            node.body
            for node in ast.parse(inspect.getsource(weight_recipes)).body
            if isinstance(node, ast.ClassDef) and node.name == parent.__name__
        ]
        helped |= {
            field.target.id: text.value.value
            for field, text in itertools.pairwise(body)
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        }
    helped = {name: text for name, text in helped.items() if name not in ("schedule", "rules")}  # of the class
    assert set(helped) == {field.name for field in dataclasses.fields(kind)}
    assert [field for field, text in helped.items() if not text.rstrip().endswith(".")] == []


@pytest.mark.says
def test_the_table_of_bad_values_misses_no_field_of_distillation():
    assert set(OUT_OF_RANGE) == {field.name for field in dataclasses.fields(Distil)}


@pytest.mark.survives
@pytest.mark.parametrize(("name", "value"), [(name, bad) for name, bads in OUT_OF_RANGE.items() for bad in bads])
def test_a_value_out_of_range_is_refused_by_the_name_of_its_field(name, value):
    with pytest.raises(RecipeError) as caught:
        Distil(**{name: value})
    assert name in caught.value.asked
    assert repr(value) in caught.value.found


@pytest.mark.survives
def test_an_objective_of_nothing_is_refused():
    with pytest.raises(RecipeError, match="nothing is learned"):
        Distil(kl_weight=0.0)
    assert Distil(kl_weight=0.0, hidden_weight=1).hidden_weight == 1


@pytest.mark.survives
@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        *((kind, "density", value) for kind in (Train, Rewire, Gradual, Rewind) for value in (0.0, 1.01, None)),
        *((kind, "structure", value) for kind in (Train, Rewire) for value in ("head", "channel", "2:4", "blocks")),
        *((Rewire, name, value) for name in ("until", "drop") for value in (0.0, 1.5)),
        (Rewire, "allocation", "global"),
        (Rewind, "allocation", "erk"),
        (Rewind, "allocation", "cost"),
        (Rewire, "method", "wanda"),
        (Train, "method", "rigl"),
        (Rewire, "grow", "weight"),
        (Gradual, "every", 0),
        (Gradual, "until", 0.0),
        (Rewind, "rewind", 1000),
        (Rewind, "rounds", 0),
        (Train, "keep_dense", "down_proj"),
        (Train, "price", ("",)),
        (Train, "from_scratch", 1),
        (Train, "steps", 0),
    ],
)
def test_a_training_that_cannot_be_is_refused_by_the_name_of_its_field(kind, field, value):
    with pytest.raises(RecipeError, match=field):
        kind(**{field: value})


@pytest.mark.reproduces
def test_one_recipe_or_several_go_through_yaml_and_plain_data(tmp_path):
    given = (
        Prune(method="wanda", structure="2:4", keep_dense=("down_proj",)),
        Distil(layers=(0, 2), learning_rate=1 / 3),
        Quantize(bits=4, group_size=32),
        Train(structure="16x16", from_scratch=True),
        Rewire(density=0.1, allocation="cost", price=("down_proj=2", "q_proj=.5")),
        Gradual(until=0.5, keep_dense=("up_proj",)),
        Rewind(rounds=2, rewind=3, allocation="global"),
        Tickets(rounds=3),
    )
    for number, recipe in enumerate((*given, given, given[:1])):
        write_recipe(recipe, tmp_path / f"{number}.yaml")
        assert read_recipe(tmp_path / f"{number}.yaml") == recipe
    assert [from_dict(yaml.safe_load(yaml.safe_dump(to_dict(recipe)))) for recipe in given] == list(given)
    assert {to_dict(recipe)["recipe"] for recipe in given} == set(WEIGHT_RECIPES) <= set(RECIPES)


@pytest.mark.matches
@pytest.mark.parametrize("structure", ["2:4", "'2:4'", "4:8", "16x16", "head"])
def test_a_structure_is_read_as_it_is_written(tmp_path, structure):
    """YAML 1.1 takes 2:4 for a number to base 60."""
    (tmp_path / "r.yaml").write_text(f"recipe: prune\nmethod: wanda\nstructure: {structure}\n")
    assert read_recipe(tmp_path / "r.yaml").structure == structure.strip("'")
    with pytest.raises(RecipeError, match="124"):
        Prune(structure=124)


@pytest.mark.survives
@pytest.mark.parametrize("content", ["[]", "- recipe: prune\n- words\n", "- recipe: prune\n  densty: 0.1\n", "- - a\n"])
def test_a_bad_list_of_stages_is_a_recipe_error(tmp_path, content):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(RecipeError):
        read_recipe(tmp_path / "bad.yaml")
