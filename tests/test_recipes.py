"""Recipes: every field explained, every range guarded, the same through Python, plain data and YAML."""

import ast
import dataclasses
import inspect
import itertools
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fewedges import recipes
from fewedges.errors import RecipeError
from fewedges.recipes import RECIPES, SparseAttention, from_dict, read_recipe, to_dict, write_recipe

FIELDS = {field.name: field for field in dataclasses.fields(SparseAttention)}
CHOICES = dict(recipes._choices(SparseAttention()))

OUT_OF_RANGE = {
    "kl_margin": (-0.1, math.nan, math.inf, "0.1"),
    "loss_margin": (math.nan, -math.inf, "0"),
    "target_edges": (0.0, -1.0, math.nan, math.inf, "3", True),
    "target_heads": (0, -3, 1.5, "3", True),
    "head_multiplier_start": (0.0, -1.0, math.nan, math.inf),
    "kl_weight": (-1.0, math.nan, None, True),
    "loss_weight": (-1e-9, math.inf),
    "bias_start": (math.nan, math.inf, None),
    "gate_query": (1, "yes", None),
    "anneal_from": (-1.0, math.nan),
    "anneal_steps": (-1, 1.5),
    "layer_weights": ((1.0, -1.0), (math.nan,), ("1",), 3.0, [1.0]),
    "head_weights": ((-0.1,), (math.inf, 1.0), 3),
    "head_closing": (-0.1, math.nan, math.inf, None),
    "path_closing": (-0.1, math.nan, math.inf, None),
    "layer_budgets": ((1.0, 0.0), (-1.0,), (math.nan,), 3.0),
    "multiplier_start": (0.0, -1.0, math.nan),
    "multiplier_rate": (0.0, math.inf),
    "multiplier_width": (0.0, -0.02),
    "slack": (-0.1, math.nan, None),
    "cooling": (1, "yes", None),
    "smoothing": (1.0, -0.1, 1.5, math.nan),
    "lora_rank": (0, -4, 2.5),
    "learning_rate": (0.0, -1e-4, "2e-4"),
    "bias_learning_rate": (0.0, math.nan),
    "adam_betas": ((0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, 0.95, 0.99), 0.9),
    "weight_decay": (-0.1, math.inf),
    "clip": (0.0, -1.0),
    "warmup_steps": (-1, 0.5),
    "decay_fraction": (-0.1, 1.1, math.nan),
    "context_length": (0, 1, -5, 2.5, None),
    "batch_size": (0, -1, 1.5, True),
    "micro_batch": (0, -1, 5, 0.5),
    "steps": (0, -1, 1.5, math.inf),
    "tokens": (0, -1, 10.5),
    "minutes": (0.0, -1.0, math.nan),
    "seed": (-1, 0.5, None),
    "compiled": (1, "yes", None),
    "graph": (1, "yes", None),
    "log_every": (0, -1),
    "checkpoint_every": (0, 2.5),
    **{name: ("neither", "", None, 1) for name in CHOICES},
}


@pytest.mark.says
def test_every_field_has_a_sentence_of_help_under_it():
    (body,) = [
        node.body
        for node in ast.parse(inspect.getsource(recipes)).body
        if isinstance(node, ast.ClassDef) and node.name == "SparseAttention"
    ]
    helped = {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    assert set(helped) == set(FIELDS)
    assert [name for name, text in helped.items() if len(text.split()) < 3 or not text.rstrip().endswith(".")] == []


@pytest.mark.says
def test_a_recipe_is_frozen_and_takes_keywords_only():
    with pytest.raises(TypeError):
        SparseAttention(0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SparseAttention().seed = 3


@pytest.mark.says
def test_the_table_of_bad_values_misses_no_field():
    assert set(OUT_OF_RANGE) == set(FIELDS)


@pytest.mark.survives
@pytest.mark.parametrize(("name", "value"), [(name, bad) for name, bads in OUT_OF_RANGE.items() for bad in bads])
def test_a_value_out_of_range_is_refused_by_the_name_of_its_field(name, value):
    with pytest.raises(RecipeError) as caught:
        SparseAttention(**{name: value})
    assert name in caught.value.asked
    assert repr(value) in caught.value.found
    assert caught.value.hint


@pytest.mark.stays
@pytest.mark.parametrize(
    "edge",
    [
        {"kl_margin": 0.0},
        {"kl_margin": None},
        {"loss_margin": None},
        {"loss_margin": -0.5},
        {"smoothing": 0.0},
        {"decay_fraction": 0.0},
        {"decay_fraction": 1},
        {"context_length": 2},
        {"micro_batch": 16},
        {"warmup_steps": 0},
        {"kl_weight": 0.0},
        {"bias_start": -30},
        {"adam_betas": (0.0, 0.0)},
        {"target_edges": 0.01, "kl_margin": None, "loss_margin": None},
    ],
)
def test_values_at_the_edge_of_their_range_are_taken(edge):
    (name, value), *_ = edge.items()
    assert getattr(SparseAttention(**edge), name) == value


@pytest.mark.survives
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"kl_margin": None, "loss_margin": None}, "kl_margin and loss_margin"),
        ({"target_edges": 3.0}, "target_edges"),
        ({"target_edges": 3.0, "kl_margin": None}, "target_edges"),
        ({"target_edges": 3.0, "loss_margin": None}, "target_edges"),
        ({"kl_weight": 0, "loss_weight": 0}, "kl_weight and loss_weight"),
        ({"batch_size": 16, "micro_batch": 5}, "micro_batch"),
        ({"batch_size": 4, "micro_batch": 8}, "micro_batch"),
        ({"sampling": "none", "kernel": "triton"}, "sampling=none"),
        ({"graph": True}, "graph"),
        ({"graph": True, "kernel": "triton", "micro_batch": 8}, "graph"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, named):
    with pytest.raises(RecipeError) as caught:
        SparseAttention(**settings)
    assert named in caught.value.asked


@pytest.mark.says
def test_a_target_beside_a_margin_names_the_margins_that_are_set():
    for margins in ({"kl_margin": 0.1, "loss_margin": None}, {"kl_margin": None, "loss_margin": 0.1}, {}):
        with pytest.raises(RecipeError) as caught:
            SparseAttention(target_edges=3.0, **margins)
        for name in ("kl_margin", "loss_margin"):
            assert (name in caught.value.found) == (margins.get(name, 0.0) is not None)


@pytest.mark.says
def test_budget_and_tokens_per_step():
    assert not SparseAttention().has_budget()
    assert all(SparseAttention(**{name: 1}).has_budget() for name in ("steps", "tokens", "minutes"))
    assert SparseAttention(batch_size=3, context_length=7).tokens_per_step == 21


@pytest.mark.survives
@pytest.mark.parametrize("unknown", [{"learning_rat": 1.0}, {1: 2}, {1: 2, "b": 3, None: 4}, {"__class__": "x"}])
def test_an_unknown_field_is_refused_and_the_known_ones_are_listed(unknown):
    with pytest.raises(RecipeError) as caught:
        from_dict(unknown)
    assert str(sorted(map(str, unknown))[0]) in caught.value.asked
    assert all(name in caught.value.hint for name in FIELDS)


@pytest.mark.survives
@pytest.mark.parametrize("name", ["dense", "", None, ["sparse-attention"], {"a": 1}])
def test_an_unknown_recipe_is_refused_and_the_known_ones_are_listed(name):
    with pytest.raises(RecipeError) as caught:
        from_dict({"recipe": name})
    assert all(known in caught.value.hint for known in RECIPES)


positive = st.floats(1e-6, 1e6)
VALID = st.fixed_dictionaries(
    {"kl_margin": st.floats(0, 10)},
    optional={
        "loss_margin": st.none() | st.floats(-10, 10),
        "kl_weight": positive,
        "loss_weight": st.floats(0, 10),
        "bias_start": st.floats(-50, 50),
        "gate_query": st.booleans(),
        "compiled": st.booleans(),
        "anneal_from": st.floats(0, 9),
        "anneal_steps": st.integers(0, 10**6),
        "layer_weights": st.lists(st.floats(0, 10), max_size=5).map(tuple),
        "head_weights": st.lists(st.floats(0, 10), max_size=5).map(tuple),
        "head_closing": st.floats(0, 2),
        "path_closing": st.floats(0, 2),
        "layer_budgets": st.lists(st.floats(0.1, 10), max_size=5).map(tuple),
        "multiplier_start": positive,
        "target_heads": st.none() | st.integers(1, 10**4),
        "head_multiplier_start": positive,
        "smoothing": st.floats(0, 0.999),
        "adam_betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
        "learning_rate": positive,
        "decay_fraction": st.floats(0, 1),
        "batch_size": st.integers(1, 4096),
        "steps": st.none() | st.integers(1, 10**9),
        "minutes": st.none() | positive,
        "seed": st.integers(0, 2**31),
        **{name: st.sampled_from(options) for name, options in CHOICES.items() if name != "kernel"},
    },
)


@pytest.mark.stays
@given(settings=VALID)
def test_plain_data_gives_back_the_same_recipe(settings):
    recipe = SparseAttention(**settings)
    data = to_dict(recipe)
    assert from_dict(data) == recipe
    assert from_dict(yaml.safe_load(yaml.safe_dump(data))) == recipe
    assert data["recipe"] == "sparse-attention"
    assert not any(isinstance(value, tuple) for value in data.values())


@pytest.mark.reproduces
def test_yaml_round_trip_keeps_every_bit_and_names_every_field(tmp_path):
    recipe = SparseAttention(
        **{"learning_rate": 1 / 3, "layer_weights": (0.1, 2.0), "kl_margin": None, "loss_margin": None},
        **{"target_edges": 10 / 3, "steps": 10**7, "bias": "constant", "gate_query": True},
    )
    write_recipe(recipe, tmp_path / "r.yaml")
    assert read_recipe(tmp_path / "r.yaml") == recipe
    assert set(yaml.safe_load((tmp_path / "r.yaml").read_text())) == {"recipe", *FIELDS}


@pytest.mark.stays
def test_exponents_without_a_dot_are_numbers_in_yaml(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("learning_rate: 1e-3\nlayer_weights: [1e0, 2]\nbias: constant\n")
    assert read_recipe(file) == SparseAttention(learning_rate=0.001, layer_weights=(1.0, 2), bias="constant")


@pytest.mark.survives
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"- a\n- b\n",
        b"just words",
        b"steps: [1, 2",
        b"steps: 1\n\tbatch_size: 2\n",
        b"\xff\xfe\x00binary",
        b"steps: !!python/object/apply:os.system ['true']\n",
        b"steps: ten\n",
        b"steps: {a: 1}\n",
        b"steps: 2026-11-22\n",
        b"? [a, b]\n: 3\n",
        b"bias: [learned]\n",
        b"layer_weights: 3\n",
        b"no_such_field: 1\n",
    ],
)
def test_bad_yaml_is_a_recipe_error_and_nothing_else(tmp_path, content):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError):
        read_recipe(file)


@pytest.mark.survives
def test_a_missing_recipe_file_is_named(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(RecipeError, match=str(path)):
            read_recipe(path)


@pytest.mark.says
@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml")), ids=lambda path: path.name
)
def test_every_recipe_that_ships_can_be_read(file):
    given = read_recipe(file)
    stages = given if isinstance(given, tuple) else (given,)
    assert all(type(stage) in RECIPES.values() for stage in stages)
    assert isinstance(given, SparseAttention | tuple)
