"""The training loop on tiny models: resumed runs give the same bits, and nothing goes wrong in silence."""

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from fewedges import cli, store
from fewedges.data.text import Text
from fewedges.errors import Interrupted, RecipeError, StoreError, TrainingError
from fewedges.recipes import SparseAttention, write_recipe
from fewedges.sparsify.attention import objective, training
from fewedges.sparsify.attention.constraint import Multiplier, violation
from fewedges.sparsify.attention.interface import GatePass, is_gated
from fewedges.sparsify.attention.objective import RARE, priced_edges, priced_heads
from fewedges.sparsify.attention.student import trained
from fewedges.sparsify.attention.training import annealed, learning_rate_factor, noise_seed, post_train
from tiny import NoiseBatches, tiny_loaded

CLOCK = ("seconds", "tokens_per_second")


def recipe(**changes):
    settings = {
        "steps": 8,
        "batch_size": 4,
        "context_length": 12,
        "log_every": 1,
        "warmup_steps": 2,
        "multiplier_start": 0.02,
        "learning_rate": 1e-3,
        "lora_rank": 4,
        "checkpoint_every": 1000,
    }
    return SparseAttention(**(settings | changes))


@functools.cache
def dense(name="llama", seed=0):
    return tiny_loaded(name, seed)


def text(windows=14, length=12):
    """A small Text source: its epochs end inside a batch of 4."""
    stream = np.random.default_rng(5).integers(0, 61, windows * length + 3).astype(np.uint16)
    return Text("small", stream, length, seed=1, facts={"sha256": "abc"})


class StopAt:
    """Watch a run, and send it a signal after certain steps."""

    def __init__(self, *steps, number=signal.SIGINT):
        self.steps, self.number, self.seen = steps, number, []

    def __call__(self, record):
        self.seen.append(record["step"])
        if record["step"] in self.steps:
            signal.raise_signal(self.number)


def state(folder):
    """Everything a checkpoint holds that must not depend on stops."""
    stored = store.load(folder / "checkpoint", "checkpoint")
    facts = {name: x for name, x in stored.facts.items() if name not in ("seconds", "versions", "recipe")}
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return stored.tensors, facts, [{k: v for k, v in r.items() if k not in CLOCK} for r in records]


def same(folder, other):
    """Bitwise: parameters, optimiser moments, multiplier, step, and the log but for its clock."""
    (tensors, facts, records), (tensors2, facts2, records2) = state(folder), state(other)
    assert facts == facts2
    assert records == records2
    assert set(tensors) == set(tensors2) == {"parameters", "moments"}
    for stem in tensors:
        assert set(tensors[stem]) == set(tensors2[stem]) != set()
        differ = [name for name, x in tensors[stem].items() if not torch.equal(x, tensors2[stem][name])]
        assert differ == []


def whole_and_stopped(base, settings, data, tmp_path, *stops, control=False, number=signal.SIGINT):
    whole = post_train(base, settings, data, folder=tmp_path / "whole", control=control)
    code = 128 + number
    for step in stops:
        watch = StopAt(step, number=number)
        with pytest.raises(Interrupted, match=f"after step {step}") as caught:
            post_train(base, settings, data, folder=tmp_path / "parts", control=control, watch=watch)
        assert caught.value.code == code
        assert store.load(tmp_path / "parts" / "checkpoint").facts["step"] == step
    watch = StopAt()
    resumed = post_train(base, settings, data, folder=tmp_path / "parts", control=control, watch=watch)
    assert watch.seen == list(range(stops[-1] + 1, settings.steps + 1))
    same(tmp_path / "whole", tmp_path / "parts")
    assert whole.finished
    assert resumed.finished
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, resumed.model.state_dict()[name]), name


@pytest.fixture
def fused(monkeypatch):
    """The optimiser of a GPU, which torch has for the CPU too."""
    monkeypatch.setattr(training, "_fused", lambda student: True)


def before_each_piece(monkeypatch, act):
    """Have `act(step, part, windows)` called before every micro-batch; returns what undoes it."""
    inputs = training._inputs

    def hooked(run, batch):
        for part, given in enumerate(inputs(run, batch)):
            act(run.step, part, len(given.tokens))
            yield given

    monkeypatch.setattr(training, "_inputs", hooked)
    return lambda: monkeypatch.setattr(training, "_inputs", inputs)


# -- resume ----------------------------------------------------------------------------------------------------


@pytest.mark.reproduces
@pytest.mark.parametrize("stop", [1, 5, 8])
@pytest.mark.parametrize("train", ["full", "attention", "lora"])
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_run_stopped_anywhere_and_resumed_gives_the_same_bits(tmp_path, model, train, stop):
    settings = recipe(train=train, micro_batch=2)  # two micro-batches a step
    whole_and_stopped(dense(model), settings, NoiseBatches(), tmp_path, stop)


@pytest.mark.reproduces
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"micro_batch": 1, "sampling": "none"},
        {"bias": "constant", "bias_start": 0.3},
        {"anneal_from": 2.0, "anneal_steps": 6},
        {"layer_weights": (1.0, 0.5), "head_weights": (1.0, 0.0, 2.0, 1.0)},
        {"target_heads": 3, "multiplier_rate": 0.3},
        {"slack": 0.02, "cooling": True, "decay_fraction": 0.8},
        {"kl_margin": None, "loss_margin": 0.01, "weight_decay": 0.1},
        {"gate_query": True},
        {"gate_query": True, "bias": "constant", "train": "lora"},
        {"target_edges": 3.0, "kl_margin": None, "loss_margin": None},
        {"precision": "bf16", "train": "attention"},
        {"precision": "bf16", "train": "lora"},
    ],
    ids=str,
)
def test_every_kind_of_run_survives_two_stops(tmp_path, settings):
    whole_and_stopped(dense(), recipe(steps=5, **settings), NoiseBatches(), tmp_path, 2, 3)


@pytest.mark.reproduces
@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_fused_run_survives_two_stops(tmp_path, fused, train):
    settings = recipe(steps=5, train=train, clip=0.05, gate_query=True)
    whole_and_stopped(dense(), settings, NoiseBatches(), tmp_path, 2, 3)


@pytest.mark.reproduces
@pytest.mark.parametrize("made", [text, NoiseBatches], ids=["text", "noise"])
def test_a_batch_prepared_ahead_is_the_one_of_its_step_and_of_no_other(made):
    run = training._start(dense(), recipe(), made(), None, gated=True)
    for step in (1, 3, 4, 7):  # with text, an epoch ends in steps 3 and 6
        run.step, wanted = step, made().at(step, 4)
        for ahead in (None, step, step + 1, step - 1):
            run.ahead = None if ahead is None else (ahead, run.data.at(ahead, 4))
            found = training._batch(run)
            assert torch.equal(found.tokens, wanted.tokens)
            assert torch.equal(found.counts, wanted.counts)
    wrong = run.data.at(9, 4)
    run.ahead = (run.step, wrong)
    assert training._batch(run) is wrong  # it is taken, not made again


@pytest.mark.reproduces
def test_a_run_that_prepares_its_batches_ahead_gives_the_same_bits(tmp_path, monkeypatch):
    """What recipe.graph does on a GPU: the next step's batch is made before this step's record is read."""
    update, asked = training._update, []

    class Counting(NoiseBatches):
        def at(self, step, size):
            asked.append(step)
            return super().at(step, size)

    def ahead(run, norm, found):
        update(run, norm, found)
        run.ahead = (run.step + 1, run.data.at(run.step + 1, run.recipe.batch_size))

    post_train(dense(), recipe(steps=5), NoiseBatches(), folder=tmp_path / "whole")
    monkeypatch.setattr(training, "_update", ahead)
    with pytest.raises(Interrupted):
        post_train(dense(), recipe(steps=5), Counting(), folder=tmp_path / "ahead", watch=StopAt(2))
    assert asked == [0, 1, 2]
    post_train(dense(), recipe(steps=5), Counting(), folder=tmp_path / "ahead")
    assert asked == [0, 1, 2, 2, 3, 4, 5]  # each batch once a piece, the last one in vain
    same(tmp_path / "whole", tmp_path / "ahead")


NEWER = ("gate_query", "target_edges", "compiled", "target_heads", "head_multiplier_start")


def forget_newer_fields(folder):
    """Make a checkpoint one of the time before these fields."""
    stored = store.load(folder, "checkpoint")
    known = {name: value for name, value in stored.facts["recipe"].items() if name not in NEWER}
    assert len(known) == len(stored.facts["recipe"]) - len(NEWER)
    older = {name: value for name, value in stored.facts.items() if name != "head_multiplier"}
    store.save(folder, "checkpoint", stored.tensors, older | {"recipe": known})


@pytest.mark.reproduces
def test_a_checkpoint_that_does_not_know_a_newer_field_means_its_default(tmp_path):
    post_train(dense(), recipe(steps=4), NoiseBatches(), folder=tmp_path / "whole")
    with pytest.raises(Interrupted):
        post_train(dense(), recipe(steps=4), NoiseBatches(), folder=tmp_path / "parts", watch=StopAt(2))
    forget_newer_fields(tmp_path / "parts" / "checkpoint")
    changes = {"gate_query": True, "compiled": True}
    changes |= {"target_edges": 3.0, "kl_margin": None, "loss_margin": None}
    for change in ({"gate_query": True}, {"compiled": True}, changes):
        with pytest.raises(StoreError, match=rf"started with ({'|'.join(change)})="):
            post_train(dense(), recipe(steps=4, **change), NoiseBatches(), folder=tmp_path / "parts")
    post_train(dense(), recipe(steps=4), NoiseBatches(), folder=tmp_path / "parts")
    same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.reproduces
@pytest.mark.parametrize("stop", [3, 4, 7])  # 14 windows, 4 a step: epochs end inside step 4 and after step 7
def test_a_run_stopped_at_the_end_of_an_epoch_gives_the_same_bits(tmp_path, stop):
    whole_and_stopped(dense(), recipe(micro_batch=2), text(), tmp_path, stop, number=signal.SIGTERM)


@pytest.mark.reproduces
def test_the_control_resumes_with_the_same_bits(tmp_path):
    whole_and_stopped(dense("gpt2"), recipe(micro_batch=2), NoiseBatches(), tmp_path, 1, 5, control=True)


@pytest.mark.reproduces
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_inside_gradient_accumulation_waits_for_the_end_of_the_step(tmp_path, monkeypatch, number):
    settings = recipe(micro_batch=1)
    post_train(dense(), settings, NoiseBatches(), folder=tmp_path / "whole")
    calls = []

    def interrupted(step, part, windows):
        calls.append((step, part))
        if calls[-1] == (2, 1):
            signal.raise_signal(number)

    undo = before_each_piece(monkeypatch, interrupted)
    with pytest.raises(Interrupted, match="after step 3") as caught:
        post_train(dense(), settings, NoiseBatches(), folder=tmp_path / "parts")
    assert caught.value.code == 128 + number
    assert calls[-1] == (2, 3)
    undo()
    post_train(dense(), settings, NoiseBatches(), folder=tmp_path / "parts")
    same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.reproduces
@pytest.mark.parametrize("crash", [1, 5])  # before the first checkpoint, and two steps after one
def test_a_crash_inside_accumulation_goes_back_to_the_last_checkpoint(tmp_path, monkeypatch, crash):
    settings = recipe(micro_batch=2, checkpoint_every=3)
    post_train(dense(), settings, NoiseBatches(), folder=tmp_path / "whole")

    def crashing(step, part, windows):
        if (step, part) == (crash, 1):
            raise ZeroDivisionError

    undo = before_each_piece(monkeypatch, crashing)
    with pytest.raises(ZeroDivisionError):
        post_train(dense(), settings, NoiseBatches(), folder=tmp_path / "parts")
    with open(tmp_path / "parts" / "log.jsonl", "a") as log:
        log.write('{"step": 3, "tokens": 14')  # a line cut by the crash
    undo()
    watch = StopAt()
    post_train(dense(), settings, NoiseBatches(), folder=tmp_path / "parts", watch=watch)
    assert watch.seen[0] == (1 if crash == 1 else 4)
    same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.reproduces
def test_a_finished_run_is_returned_without_another_step(tmp_path):
    first = post_train(dense(), recipe(steps=2), NoiseBatches(), folder=tmp_path)
    watch = StopAt()
    again = post_train(dense(), recipe(steps=2), NoiseBatches(), folder=tmp_path, watch=watch)
    assert (watch.seen, again.finished) == ([], True)
    assert again.records == first.records
    for name, parameter in trained(first.model).items():
        assert torch.equal(parameter, trained(again.model)[name])


@pytest.mark.reproduces
def test_the_global_random_state_has_no_say(tmp_path):
    for number, folder in enumerate(("one", "two")):
        torch.manual_seed(number)
        post_train(dense(), recipe(steps=3, train="lora"), NoiseBatches(), folder=tmp_path / folder)
    same(tmp_path / "one", tmp_path / "two")
    post_train(dense(), recipe(steps=3, train="lora", seed=1), NoiseBatches(), folder=tmp_path / "three")
    assert state(tmp_path / "three")[2] != state(tmp_path / "one")[2]


@pytest.mark.stays
def test_the_dense_model_is_left_alone():
    before = {name: x.clone() for name, x in dense().model.state_dict().items()}
    result = post_train(dense(), recipe(steps=3), NoiseBatches())
    assert all(torch.equal(x, before[name]) for name, x in dense().model.state_dict().items())
    moved = [name for name, x in before.items() if not torch.equal(x, result.model.state_dict()[name])]
    assert len(moved) > 10
    assert not is_gated(dense().model)


@pytest.mark.stays
@pytest.mark.parametrize("train", ["attention", "lora"])
def test_what_does_not_train_does_not_move(train):
    result = post_train(dense(), recipe(steps=3, train=train), NoiseBatches())
    names = set(trained(result.model))
    free = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_bias") if train == "attention" else ("lora_", "gate_bias")
    assert names == {name for name in names if any(word in name for word in free)}
    known = dense().model.state_dict()
    for name, x in result.model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if name not in names and plain in known:
            assert torch.equal(x, known[plain]), name
            assert x.data_ptr() == known[plain].data_ptr(), f"{name} is a second copy"


@pytest.mark.survives
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 2e-3}, "learning_rate"),
        ({"seed": 1}, "seed"),
        ({"batch_size": 8}, "batch_size"),
        ({"train": "attention"}, "train"),
        ({"bias": "constant"}, "bias"),
        ({"gate_query": True}, "gate_query"),
        ({"compiled": True}, "compiled"),
        ({"smoothing": 0.5}, "smoothing"),
        ({"layer_weights": (1.0, 1.0)}, "layer_weights"),
        ({"data": NoiseBatches(seed=1)}, "data"),
        ({"data": text()}, "data"),
        ({"base": "gpt2"}, "base"),
        ({"control": True}, "gated"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_a_folder_of_another_run_is_refused_by_the_name_of_what_differs(tmp_path, change, named):
    post_train(dense(), recipe(steps=1), NoiseBatches(), folder=tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint").iterdir()}
    base, data = dense(change.pop("base", "llama")), change.pop("data", NoiseBatches())
    control = change.pop("control", False)
    with pytest.raises(StoreError, match=f"started with {named}="):
        post_train(base, recipe(**change), data, folder=tmp_path, control=control)
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint").iterdir()} == before


@pytest.mark.stays
def test_the_budget_and_the_margins_may_change_when_a_run_is_resumed(tmp_path):
    post_train(dense(), recipe(steps=2, decay_fraction=0.0), NoiseBatches(), folder=tmp_path / "parts")
    longer = recipe(steps=4, decay_fraction=0.0, log_every=1, checkpoint_every=3)
    assert post_train(dense(), longer, NoiseBatches(), folder=tmp_path / "parts").records[-1]["step"] == 4
    post_train(dense(), longer, NoiseBatches(), folder=tmp_path / "whole")
    assert all(
        torch.equal(x, state(tmp_path / "whole")[0]["parameters"][n])
        for n, x in state(tmp_path / "parts")[0]["parameters"].items()
    )


@pytest.mark.survives
def test_a_damaged_checkpoint_is_a_store_error_not_a_fresh_start(tmp_path):
    post_train(dense(), recipe(steps=1), NoiseBatches(), folder=tmp_path)
    body = next((tmp_path / "checkpoint").glob("moments-*"))
    body.write_bytes(body.read_bytes()[:-1] + b"\x01")
    with pytest.raises(StoreError, match="moments"):
        post_train(dense(), recipe(), NoiseBatches(), folder=tmp_path)


# -- accumulation ----------------------------------------------------------------------------------------------


@pytest.mark.matches
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_accumulated_gradients_equal_those_of_the_whole_batch(monkeypatch, micro_batch):
    """Without noise, which is drawn by micro-batch; with unequal counts in the windows, which the divisor must see."""

    class Uneven(NoiseBatches):
        def at(self, step, size):
            batch = super().at(step, size)
            for row in range(size):
                batch.counts[row, 2 + row :] = False
            return batch

    gradients, records = {}, {}
    check = training._check_finite

    def keep(run, values):
        gradients[run.micro_batch] = {name: p.grad.clone() for name, p in trained(run.student).items()}
        records[run.micro_batch] = values
        check(run, values)

    monkeypatch.setattr(training, "_check_finite", keep)
    for size in (None, micro_batch):
        settings = recipe(steps=1, batch_size=8, micro_batch=size, sampling="none")
        post_train(dense(), settings, Uneven(), watch=None)
    whole, parts = gradients[8], gradients[micro_batch]
    scale = max(float(x.abs().max()) for x in whole.values())
    worst = max(float((parts[name] - x).abs().max()) for name, x in whole.items()) / scale
    assert worst < 8e-7  # measured 1.5e-7 to 2.2e-7
    for name, value in records[8].items():
        assert records[micro_batch][name] == pytest.approx(value, rel=4e-7)  # measured 1.1e-7


# -- signals and kill, from outside ----------------------------------------------------------------------------

OUTSIDE = SparseAttention(
    steps=40, batch_size=16, micro_batch=8, log_every=1, checkpoint_every=2, warmup_steps=5, multiplier_start=0.01
)


def sparsify_addition(folder, recipe_file):
    return ["sparsify", "addition", "--recipe", str(recipe_file), "--out", str(folder), "--json"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """An `addition` run from first to last step, in this process."""
    place = tmp_path_factory.mktemp("outside")
    write_recipe(OUTSIDE, place / "recipe.yaml")
    assert cli.main(sparsify_addition(place / "whole", place / "recipe.yaml")) == 0
    return place


@pytest.mark.reproduces
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=["INT", "TERM", "KILL"]
)
def test_a_signal_from_outside_saves_within_a_step_and_the_run_resumes_to_the_same_bits(
    uninterrupted, number, code, capsys
):
    folder = uninterrupted / f"stopped-{number}"
    words = [word for word in sparsify_addition(folder, uninterrupted / "recipe.yaml") if word != "--json"]
    command = [sys.executable, "-m", "fewedges", *words]
    seen, pipes = 0, {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:
        for line in process.stderr:
            if line.startswith("step "):
                seen = int(line.split()[1])
            if seen == 5:
                os.kill(process.pid, number)
                break
        rest = process.stderr.read()
    assert process.returncode == code, rest
    assert "Traceback" not in rest
    last = max([seen, *(int(line.split()[1]) for line in rest.splitlines() if line.startswith("step "))])
    assert last < OUTSIDE.steps, "the signal came too late to prove anything"
    kept = store.load(folder / "checkpoint", "checkpoint").facts["step"]
    assert kept == last if code > 0 else last - OUTSIDE.checkpoint_every <= kept <= last
    if code > 0:
        assert f"stopped after step {last}" in rest
        assert "the same command again" in rest
    assert cli.main(sparsify_addition(folder, uninterrupted / "recipe.yaml")) == 0
    capsys.readouterr()
    same(folder, uninterrupted / "whole")
    assert store.read_manifest(folder)["files"] == store.read_manifest(uninterrupted / "whole")["files"]  # sha256


# -- numbers that are not finite -------------------------------------------------------------------------------


BOTH_OPTIMISERS = pytest.mark.parametrize("on_gpu", [False, True], ids=["plain", "fused"])


def planted(monkeypatch, plant, step=3):
    """Have `plant(run)` called just before a step."""
    forward = training._accumulate_within_memory

    def hooked(run, batch):
        if run.step == step:
            plant(run)
        return forward(run, batch)

    monkeypatch.setattr(training, "_accumulate_within_memory", hooked)


@pytest.mark.survives
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("model.layers.1.mlp.up_proj.weight", math.nan),
        ("model.layers.1.mlp.up_proj.weight", -math.inf),
        ("model.norm.weight", math.nan),
        ("model.layers.0.self_attn.gate_bias", math.nan),
        ("model.layers.0.self_attn.gate_query", math.nan),
    ],
)
@BOTH_OPTIMISERS
def test_a_bad_weight_stops_the_run_before_the_update_and_is_named(tmp_path, monkeypatch, name, bad, on_gpu):
    monkeypatch.setattr(training, "_fused", lambda student: on_gpu)
    seen = {}

    def plant(run):
        with torch.no_grad():
            trained(run.student)[name].view(-1)[0] = bad
        seen["run"], seen["before"] = run, {n: p.detach().clone() for n, p in trained(run.student).items()}

    planted(monkeypatch, plant)
    settings = recipe(checkpoint_every=2, gate_query=True)
    with pytest.raises(TrainingError, match=f"step 3: parameter {re.escape(name)} is not finite") as caught:
        post_train(dense(), settings, NoiseBatches(), folder=tmp_path)
    assert caught.value.hint
    assert all(torch.equal(p, seen["before"][n]) for n, p in trained(seen["run"].student).items() if n != name)
    kept = store.load(tmp_path / "checkpoint", "checkpoint")
    assert kept.facts["step"] == 2
    assert all(torch.isfinite(x).all() for named in kept.tensors.values() for x in named.values())


def moments(run):
    """Adam's state by name: both moments and the step they count."""
    named = trained(run.student).items()
    return {(name, key): x.clone() for name, p in named for key, x in run.optimizer.state[p].items()}


@pytest.mark.survives
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "model.layers.0.self_attn.gate_query"])
@BOTH_OPTIMISERS
def test_a_bad_gradient_is_named_and_neither_parameters_nor_moments_move(tmp_path, monkeypatch, bad, name, on_gpu):
    monkeypatch.setattr(training, "_fused", lambda student: on_gpu)
    seen = {}

    def plant(run):
        def spoil(gradient):
            gradient = gradient.clone()
            gradient[0, 0] = bad
            return gradient

        trained(run.student)[name].register_hook(spoil)
        seen["run"], seen["before"] = run, {n: p.detach().clone() for n, p in trained(run.student).items()}
        seen["moments"] = moments(run)

    planted(monkeypatch, plant)
    with pytest.raises(TrainingError, match=f"step 3: gradient of {re.escape(name)} is not finite"):
        post_train(dense(), recipe(checkpoint_every=3, gate_query=True), NoiseBatches(), folder=tmp_path)
    assert all(torch.equal(p, seen["before"][n]) for n, p in trained(seen["run"].student).items())
    after = moments(seen["run"])
    assert after.keys() == seen["moments"].keys()
    assert all(torch.equal(x, seen["moments"][key]) for key, x in after.items())
    assert {float(x) for (_, key), x in after.items() if key == "step"} == {3.0}
    assert {group["fused"] for group in seen["run"].optimizer.param_groups} == {on_gpu}
    assert store.load(tmp_path / "checkpoint").facts["step"] == 3


@pytest.mark.matches
@BOTH_OPTIMISERS
@pytest.mark.parametrize("clip", [1e-3, 0.4, 1e3], ids=["cut far", "cut", "not cut"])
def test_an_update_is_that_of_clipped_gradients_and_none_where_anything_is_not_finite(monkeypatch, clip, on_gpu):
    """Adam's moments after a first step show the gradient it was given: Adam itself would hide a scale."""
    monkeypatch.setattr(training, "_fused", lambda student: on_gpu)
    run = training._start(dense(), recipe(clip=clip), NoiseBatches(), None, gated=True)
    training._set_learning_rates(run)
    generator = torch.Generator().manual_seed(1)
    for parameter in run.parameters:
        parameter.grad = 0.01 * torch.randn(parameter.shape, generator=generator)
    raw = [parameter.grad.double().clone() for parameter in run.parameters]
    before = [parameter.detach().clone() for parameter in run.parameters]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in run.parameters])
    good = torch.tensor([1.0, 2.0])
    for found in (torch.tensor([1.0, math.nan]), torch.tensor([math.inf, 1.0]), torch.tensor([1.0, -math.inf])):
        training._update(run, norm, found)
        assert all(torch.equal(p, x) for p, x in zip(run.parameters, before, strict=True))
        states = [run.optimizer.state[p] for p in run.parameters]
        assert all(not state or (state["step"] == 0 and state["exp_avg"].abs().max() == 0) for state in states)
    training._update(run, norm, good)
    length = torch.stack([x.square().sum() for x in raw]).sum().sqrt()
    factor = min(1.0, clip / float(length))
    assert (factor < 1) == (clip < 1)
    for parameter, gradient, old in zip(run.parameters, raw, before, strict=True):
        state = run.optimizer.state[parameter]
        size = 0.1 * factor * gradient.abs().max()  # 1 - beta
        assert (state["exp_avg"] - 0.1 * factor * gradient).abs().max() / size < CLIPPED
        assert (parameter.grad - factor * gradient).abs().max() / (10 * size) < CLIPPED
        assert state["step"] == 1
        assert not torch.equal(parameter, old)


CLIPPED = 3e-6  # relative; measured 8.0e-7: torch adds 1e-6 to the norm, here 1.4


@pytest.mark.survives
def test_a_bad_dense_model_stops_the_first_step(tmp_path):
    base = tiny_loaded("llama", seed=3)
    base.model.lm_head.weight[5, 0] = math.nan
    with pytest.raises(TrainingError, match=r"step 0: parameter lm_head\.weight"):
        post_train(base, recipe(), NoiseBatches(), folder=tmp_path)
    assert not store.is_stored(tmp_path / "checkpoint")


@pytest.mark.survives
def test_a_bad_loss_alone_is_named(monkeypatch):
    """NaN that enters behind all parameters (a bad batch, a bad kernel): the loss is named, or its gradients."""
    real = objective.losses

    def spoiled(*args, **kwargs):
        found = real(*args, **kwargs)
        return found._replace(cross_entropy=found.cross_entropy * math.nan)

    monkeypatch.setattr(objective, "losses", spoiled)
    with pytest.raises(TrainingError, match="step 0: cross_entropy is not finite"):
        post_train(dense(), recipe(), NoiseBatches())


@pytest.mark.survives
def test_a_parameter_that_went_bad_in_the_last_update_is_never_saved(tmp_path, monkeypatch):
    students = []
    make = training.make_student
    monkeypatch.setattr(training, "make_student", lambda *a, **k: students.append(make(*a, **k)) or students[-1])

    def spoil(record):
        if record["step"] == 4:
            with torch.no_grad():
                students[0].lm_head.weight[0, 0] = math.inf

    with pytest.raises(TrainingError, match=r"step 4: lm_head\.weight is not finite; the last checkpoint is kept"):
        post_train(dense(), recipe(checkpoint_every=2), NoiseBatches(), folder=tmp_path, watch=spoil)
    assert store.load(tmp_path / "checkpoint").facts["step"] == 2


# -- memory ----------------------------------------------------------------------------------------------------


def small_memory(monkeypatch, windows):
    """A machine that holds so many windows; returns the sizes that were tried, by step."""
    tried = []

    def limited(step, part, size):
        tried.append((step, size))
        if size > windows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    before_each_piece(monkeypatch, limited)
    return tried


@pytest.mark.survives
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(tmp_path, monkeypatch, caplog):
    post_train(dense(), recipe(batch_size=8, micro_batch=2), NoiseBatches(), folder=tmp_path / "small")
    tried = small_memory(monkeypatch, windows=3)
    post_train(dense(), recipe(batch_size=8), NoiseBatches(), folder=tmp_path / "halved")
    assert tried[:6] == [(0, 8), (0, 4), (0, 2), (0, 2), (0, 2), (0, 2)]
    assert {size for step, size in tried if step > 0} == {2}
    assert [text for record in caplog.records if "memory" in (text := record.message)] == [
        "out of memory: micro_batch is now 4, batch_size stays 8",
        "out of memory: micro_batch is now 2, batch_size stays 8",
    ]
    same(tmp_path / "small", tmp_path / "halved")


@pytest.mark.survives
def test_out_of_memory_inside_a_batch_forgets_its_first_half(tmp_path, monkeypatch):
    post_train(dense(), recipe(micro_batch=1, steps=2), NoiseBatches(), folder=tmp_path / "small")
    failed = []

    def once(step, part, windows):
        if (step, part) == (0, 1) and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("late")

    before_each_piece(monkeypatch, once)
    post_train(dense(), recipe(micro_batch=2, steps=2), NoiseBatches(), folder=tmp_path / "late")
    assert failed
    same(tmp_path / "small", tmp_path / "late")


@pytest.mark.survives
def test_a_micro_batch_that_was_halved_stays_so_after_a_resume(tmp_path, monkeypatch):
    tried = small_memory(monkeypatch, windows=2)
    with pytest.raises(Interrupted):
        post_train(dense(), recipe(batch_size=6), NoiseBatches(), folder=tmp_path, watch=StopAt(1))
    assert [size for _, size in tried] == [6, 3, 2, 2, 2]  # the next smaller divisor where there is no half
    tried.clear()
    post_train(dense(), recipe(batch_size=6), NoiseBatches(), folder=tmp_path)
    assert {size for _, size in tried} == {2}


@pytest.mark.survives
def test_one_window_that_does_not_fit_is_a_training_error_with_the_number(tmp_path, monkeypatch):
    small_memory(monkeypatch, windows=0)
    with pytest.raises(TrainingError, match="one window of 12 tokens does not fit in memory") as caught:
        post_train(dense(), recipe(), NoiseBatches(), folder=tmp_path)
    assert "context_length" in caught.value.hint


# -- budgets ---------------------------------------------------------------------------------------------------


@pytest.mark.stays
@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        ({"steps": 3}, 3),
        ({"steps": None, "tokens": 3 * 48}, 3),
        ({"steps": None, "tokens": 3 * 48 + 1}, 4),
        ({"steps": 2, "tokens": 10**6}, 2),
        ({"steps": 50, "tokens": 48}, 1),
    ],
)
def test_a_run_ends_with_the_first_budget_that_is_used_up(budget, steps):
    result = post_train(dense(), recipe(**budget), NoiseBatches())
    last = result.records[-1]
    assert (last["step"], last["tokens"], result.finished) == (steps, steps * 48, True)
    assert last["progress"] >= 1


def slow_clock(monkeypatch, seconds):
    """A clock that moves by so much every time it is read."""
    now = [0.0]

    def monotonic():
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(training, "time", types.SimpleNamespace(monotonic=monotonic))


@pytest.mark.stays
def test_minutes_are_added_up_over_resumed_pieces(tmp_path, monkeypatch):
    slow_clock(monkeypatch, 10.0)
    settings = recipe(steps=None, minutes=2.0, decay_fraction=0.0)
    with pytest.raises(Interrupted):
        post_train(dense(), settings, NoiseBatches(), folder=tmp_path, watch=StopAt(3))
    spent = store.load(tmp_path / "checkpoint").facts["seconds"]
    assert 30 <= spent < 120
    result = post_train(dense(), settings, NoiseBatches(), folder=tmp_path)
    assert result.finished
    assert 120 <= result.records[-1]["seconds"] < 140  # not 120 more than the first piece
    assert result.records[-1]["progress"] == pytest.approx(result.records[-1]["seconds"] / 120)


@pytest.mark.reproduces
def test_a_pause_leaves_a_run_unfinished_and_the_same_call_goes_on(tmp_path):
    post_train(dense(), recipe(steps=3), NoiseBatches(), folder=tmp_path / "whole")
    states = []
    for _ in range(3):
        result = post_train(dense(), recipe(steps=3), NoiseBatches(), folder=tmp_path / "parts", pause_minutes=0.0)
        states.append((result.records[-1]["step"], result.finished))
    assert states == [(1, False), (2, False), (3, True)]
    same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.stays
def test_a_pause_counts_this_piece_of_work_only(tmp_path, monkeypatch):
    slow_clock(monkeypatch, 10.0)
    steps = []
    for _ in range(3):
        result = post_train(dense(), recipe(steps=50), NoiseBatches(), folder=tmp_path, pause_minutes=1.0)
        steps.append(result.records[-1]["step"])
    assert not result.finished
    assert steps[1] - steps[0] == steps[2] - steps[1] == steps[0] > 1


@pytest.mark.stays
@pytest.mark.parametrize("every", [3, 100])
def test_records_are_kept_at_the_first_every_nth_and_the_last_step(tmp_path, every):
    result = post_train(dense(), recipe(log_every=every), NoiseBatches(), folder=tmp_path)
    assert [r["step"] for r in result.records] == ([1, 3, 6, 8] if every == 3 else [1, 8])
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.records


# -- schedules and prices --------------------------------------------------------------------------------------


@pytest.mark.matches
def test_the_learning_rate_rises_stays_and_falls():
    settings = recipe(steps=100, warmup_steps=10, decay_fraction=0.2)
    found = [learning_rate_factor(settings, step, step / 100) for step in range(100)]
    wanted = [(s + 1) / 10 if s < 10 else 1.0 if s <= 80 else (100 - s) / 20 for s in range(100)]
    assert found == pytest.approx(wanted, abs=1e-12)  # measured 2e-15: (1 - .99) / .2 in float64
    assert learning_rate_factor(settings, 100, 1.0) == 0.0
    assert learning_rate_factor(settings, 100, 1.3) == 0.0  # minutes overrun
    constant = dataclasses.replace(settings, warmup_steps=0, decay_fraction=0.0)
    assert {learning_rate_factor(constant, step, step / 100) for step in range(100)} == {1.0}


@pytest.mark.matches
def test_records_state_the_learning_rate_of_their_step():
    result = post_train(dense(), recipe(decay_fraction=0.5, learning_rate=0.01), NoiseBatches())
    wanted = [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [r["learning_rate"] / 0.01 for r in result.records] == pytest.approx(wanted, abs=1e-12)  # measured 1e-16


@pytest.mark.matches
def test_annealing_falls_linearly_to_nothing_and_opens_gates_on_its_way():
    settings = recipe(steps=5, anneal_from=200.0, anneal_steps=4, learning_rate=1e-9, bias_learning_rate=1e-9)
    assert [annealed(settings, step) for step in range(6)] == [200.0, 150.0, 100.0, 50.0, 0.0, 0.0]
    assert annealed(recipe(anneal_from=5.0, anneal_steps=0), 0) == 0.0
    edges = [r["edges_per_query_per_head"] for r in post_train(dense(), settings, NoiseBatches()).records]
    without = recipe(steps=5, learning_rate=1e-9, bias_learning_rate=1e-9)
    plain = [r["edges_per_query_per_head"] for r in post_train(dense(), without, NoiseBatches()).records]
    assert edges[0] == 6.5  # (12 + 1) / 2: a bias of 200 opens every gate
    assert edges[4] == plain[4] < 4.5


@pytest.mark.matches
@pytest.mark.parametrize("target", [2.0, 5.0])
def test_a_target_moves_the_price_by_each_batchs_edges_and_the_edges_after_it(target):
    """The run starts at 3.1 edges of 6.5; without smoothing, the price follows every batch by the law."""
    settings = recipe(
        **{"steps": 40, "target_edges": target, "kl_margin": None, "loss_margin": None, "smoothing": 0.0},
        **{"multiplier_rate": 0.1, "multiplier_start": 0.05, "bias_learning_rate": 0.05, "decay_fraction": 0.0},
    )
    records = post_train(dense(), settings, NoiseBatches()).records
    edges, prices = ([r[name] for r in records] for name in ("edges_per_query_per_head", "multiplier"))
    pulls = [min(1.0, max(-1.0, 10 * math.log(x / target))) for x in edges]
    moved = [math.log(new / old) for old, new in itertools.pairwise([0.05, *prices])]
    assert moved == pytest.approx([0.1 * pull for pull in pulls], abs=8e-16)  # measured 2.2e-16
    assert min(edges) < target < max(edges)
    assert {r["margin"] for r in records} == {None}


@pytest.mark.matches
def test_gate_queries_learn_at_the_weights_rate_without_decay():
    """Adam moves a number by the learning rate in its first step, whatever its gradient."""
    settings = recipe(steps=1, gate_query=True, learning_rate=1e-3, bias_learning_rate=0.1, weight_decay=0.5)
    run = training._start(dense(), settings, NoiseBatches(), None, gated=True)
    groups = {id(p): group for group in run.optimizer.param_groups for p in group["params"]}
    kinds = {"gate_query": (1e-3, 0.0), "gate_bias": (0.1, 0.0), "norm.weight": (1e-3, 0.0), "proj.weight": (1e-3, 0.5)}
    for name, parameter in trained(run.student).items():
        for kind in (kind for kind in kinds if name.endswith(kind)):
            group = groups[id(parameter)]
            assert (group["peak"], group["weight_decay"]) == kinds[kind]
    training._step(run)
    moved = [module.gate_query.detach().abs() for module in dense().anatomy.modules(run.student)]
    assert all(0.9 * 5e-4 < float(x.max()) <= 1.001 * 5e-4 for x in moved)  # the first of two steps of warm-up


@pytest.mark.matches
def test_layer_and_head_weights_price_edges_as_a_slow_loop_does():
    expected = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(2))  # (L, B, H, Q)
    layers, heads = (0.5, 2.0), (1.0, 0.0, 3.0, 0.25)
    for given_layers in ((), layers):
        for given_heads in ((), heads):
            found = priced_edges(expected, recipe(layer_weights=given_layers, head_weights=given_heads))
            total = 0.0
            for layer in range(2):
                for head in range(4):
                    price = (given_layers or (1.0, 1.0))[layer] * (given_heads or (1.0,) * 4)[head]
                    total += price * sum(expected[layer, b, head, q].item() for b in range(3) for q in range(5)) / 15
            assert found.item() == pytest.approx(total / 8, rel=4e-7)  # measured 1e-7, float32


@pytest.mark.matches
def test_head_closing_descends_the_sum_of_logarithms():
    """At power 1 the gradient is that of mean(e) * mean(log(e + RARE)), the first factor held; any power, its own."""
    expected = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected[0, :, 1] *= 1e-3  # a head that is nearly closed
    for power in (0.5, 1.0):
        leaf = expected.clone().requires_grad_()
        priced_edges(leaf, recipe(head_closing=power)).backward()
        twin = expected.clone().requires_grad_()
        edges = twin.mean(dim=(1, 3)) + RARE
        worth = edges.log() if power == 1.0 else edges.pow(1 - power) / (1 - power)
        (edges.mean().detach().pow(power) * worth.mean()).backward()
        assert torch.allclose(leaf.grad, twin.grad, rtol=1e-12)  # measured 4e-16, float64
    assert leaf.grad[0, 0, 1, 0] > 20 * leaf.grad[1, 0, 1, 0]  # the nearly closed head pays most: measured 48 times


def uneven_layers():
    expected = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return expected * torch.tensor([0.01, 1.0, 6.0], dtype=torch.float64)[:, None, None, None]


@pytest.mark.matches
def test_path_closing_descends_the_logarithm_of_the_number_of_paths():
    """Paths counted one by one: in every layer a path stays, or takes one of the layer's edges."""
    leaf, twin = uneven_layers().requires_grad_(), uneven_layers().requires_grad_()
    priced_edges(leaf, recipe(path_closing=1.0)).backward()
    a, b, c = twin.mean(dim=(1, 3)).sum(1)
    paths = 1 + a + b + c + a * b + a * c + b * c + a * b * c
    ((torch.stack([a, b, c]).mean().detach() + 1) * paths.log() / 12).backward()
    assert torch.allclose(leaf.grad, twin.grad, rtol=2e-15, atol=0)  # measured 3e-16, float64
    assert leaf.grad[0, 0, 0, 0] > 4 * leaf.grad[2, 0, 0, 0]  # the layer that is nearly closed pays most


@pytest.mark.matches
def test_a_layer_pays_for_its_share_over_its_budget():
    expected, budgets = uneven_layers(), (1.0, 2.0, 5.0)
    kept = [sum(expected[x, b, h, q].item() for b in range(2) for h in range(4) for q in range(5)) for x in range(3)]
    slow = [e / 10 * (e / 10 / (sum(kept) / 10 + RARE)) * 8 / budget for e, budget in zip(kept, budgets, strict=True)]
    found = priced_edges(expected, recipe(layer_budgets=budgets)).item()
    assert found == pytest.approx(sum(slow) / 12, rel=2e-15)  # measured 3e-16
    total = sum(kept)
    to_budget = (
        expected * torch.tensor([b * total / e / 8 for b, e in zip(budgets, kept, strict=True)])[:, None, None, None]
    )
    leaf = to_budget.requires_grad_()
    priced_edges(leaf, recipe(layer_budgets=budgets)).backward()
    assert torch.allclose(leaf.grad, torch.full_like(leaf, 1 / 120), rtol=1e-2)  # all alike but for RARE


@pytest.mark.stays
@pytest.mark.parametrize("closing", [{"head_closing": 1.0}, {"path_closing": 1.0}])
def test_closing_leaves_likes_alone(closing):
    expected = torch.full((2, 1, 3, 4), 0.7)
    assert torch.equal(priced_edges(expected, recipe(**closing)), priced_edges(expected, recipe()))


@pytest.mark.survives
@pytest.mark.parametrize("closing", [{"head_closing": 1.0}, {"path_closing": 1.0}, {"layer_budgets": (1.0, 2.0)}])
def test_closing_everything_leaves_finite_gradients(closing):
    leaf = torch.zeros(2, 1, 3, 4, requires_grad=True)
    priced_edges(leaf, recipe(**closing)).backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.matches
def test_the_price_of_heads_is_a_slow_loops_and_counts_nearly_whole_heads():
    expected = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    places = list(itertools.product(range(2), range(4)))
    edges = [sum(expected[x, b, h, q].item() for b in range(3) for q in range(5)) / 15 for x, h in places]
    slow = [math.log(1 + e / RARE) / math.log(1 + 1 / RARE) for e in edges]
    assert priced_heads(expected).item() == pytest.approx(sum(slow) / 8, rel=8e-16)  # measured 2e-16
    one = torch.zeros(2, 1, 3, 4, dtype=torch.float64)
    one[1, 0, 2] = 1.0
    assert priced_heads(one).item() == pytest.approx(1 / 6, rel=8e-16)  # measured 2e-16


@pytest.mark.matches
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_the_edges_of_a_head_are_those_of_the_whole_batch(micro_batch):
    """However it is cut: a head is closed if the batch says so, not if a micro-batch does."""
    gates, settings = GatePass(), recipe(sampling="none", micro_batch=micro_batch)
    run = training._start(dense(), settings, NoiseBatches(), None, gated=True)
    with torch.no_grad():
        run.student(input_ids=NoiseBatches().at(0, 4).tokens, use_cache=False, gate_pass=gates)
    edges = gates.open_edges().mean(dim=(1, 3)).flatten()
    found = sum(run.objective(given)[len(objective.NAMES) :] for given in training._inputs(run, run.data.at(0, 4)))
    assert torch.allclose(found, edges, rtol=4e-7)  # measured 1e-7, float32
    assert edges.max() > 1.2 * edges.min() > 0


@pytest.mark.stays
def test_a_target_for_heads_closes_heads_until_it_is_met():
    """Edges alone, held where they begin, close one head; the price of heads rises to the target and falls after it."""
    settings = {"steps": 130, "target_edges": 3.1, "kl_margin": None, "loss_margin": None, "multiplier_rate": 0.02}
    settings |= {"bias_learning_rate": 0.02, "decay_fraction": 0.3, "seed": 1}
    records = post_train(dense(), recipe(**settings, target_heads=5), NoiseBatches()).records
    heads, prices = ([r[name] for r in records] for name in ("open_heads", "head_multiplier"))
    top = prices.index(max(prices))
    assert heads[:30] == [8.0] * 30
    assert prices[:30] == sorted(prices[:30])
    assert heads[top] <= 6  # the running mean of some twenty batches passed 5
    assert 2 <= min(heads[-10:]) <= max(heads[-10:]) <= 5  # measured 4: on noise it overshoots, and reopens slowly
    assert prices[-1] < prices[top]
    without = post_train(dense(), recipe(**settings), NoiseBatches())
    gates = GatePass()
    with torch.no_grad():
        without.model(input_ids=NoiseBatches().at(0, 4).tokens, use_cache=False, gate_pass=gates)
    assert (gates.open_edges().mean(dim=(1, 3)) > RARE).sum() >= 7  # measured 7


@pytest.mark.stays
def test_without_a_target_heads_cost_nothing_and_are_not_reported():
    records = post_train(dense(), recipe(head_multiplier_start=50.0), NoiseBatches()).records
    plain = post_train(dense(), recipe(), NoiseBatches()).records
    drop = lambda rows: [{k: v for k, v in r.items() if k not in CLOCK} for r in rows]  # noqa: E731
    assert drop(records) == drop(plain)
    assert not {"open_heads", "head_multiplier"} & set(records[0])


@pytest.mark.says
def test_more_heads_than_there_are_is_an_error():
    with pytest.raises(RecipeError, match=r"target_heads.*9.*8 heads"):
        post_train(dense(), recipe(target_heads=9), NoiseBatches())


@pytest.mark.stays
def test_a_layer_without_a_price_keeps_its_edges():
    """With nothing but the price to learn from, the biases of the free layer stay where they began."""
    only_price = {
        "kl_weight": 1e-9,
        "loss_weight": 0.0,
        "kl_margin": 100.0,
        "loss_margin": None,
        "multiplier_start": 1.0,
    }
    settings = recipe(**only_price, sampling="none", bias_learning_rate=0.1, layer_weights=(1.0, 0.0))
    result = post_train(dense(), settings, NoiseBatches())
    priced, free = (module.gate_bias.detach() for module in dense().anatomy.modules(result.model))
    assert priced.max() < -0.6  # measured -0.70: eight steps of 0.1, less warm-up and decay
    assert free.abs().max() < 0.008  # measured 0.002


@pytest.mark.survives
@pytest.mark.parametrize(
    ("field", "given"), [("layer_weights", (1.0,)), ("layer_budgets", (1.0,)), ("head_weights", (1.0,) * 5)]
)
def test_weights_that_do_not_fit_the_model_are_refused_by_name(field, given):
    with pytest.raises(RecipeError, match=f"{field}.*{len(given)} numbers"):
        post_train(dense(), recipe(**{field: given}), NoiseBatches())


@pytest.mark.stays
def test_gate_noise_never_repeats_over_steps_and_micro_batches():
    keys = [noise_seed(0, step, part) for step in range(4000) for part in range(16)]
    assert len(set(keys)) == len(keys)
    assert not set(keys[:1000]) & {noise_seed(1, step, part) for step in range(60) for part in range(16)}


@pytest.mark.matches
def test_the_multiplier_rises_while_margins_hold_and_falls_while_one_is_broken():
    settings = recipe(kl_margin=0.1, loss_margin=0.0, smoothing=0.5, multiplier_rate=0.1, multiplier_width=0.02)
    assert violation(settings, 0.05, -0.2) == pytest.approx(-0.05)
    assert violation(settings, 0.05, 0.3) == pytest.approx(0.3)
    price = Multiplier(1.0)
    price.update_(settings, kl=0.0, excess_loss=-1.0)  # mean -0.1, clipped to -1 width
    assert math.log(price.price) == pytest.approx(0.1)
    price.update_(settings, kl=0.21, excess_loss=0.0)  # mean 0.5 * -0.1 + 0.5 * 0.11 = 0.005, a quarter of the width
    assert math.log(price.price) == pytest.approx(0.1 - 0.1 * 0.25)


# -- the control -----------------------------------------------------------------------------------------------


class Listening(NoiseBatches):
    def __init__(self):
        super().__init__()
        self.asked = []

    def at(self, step, size):
        self.asked.append((step, size))
        return super().at(step, size)


@pytest.mark.stays
def test_the_control_has_no_gates_and_reads_the_same_data():
    data, twin = Listening(), Listening()
    sparse = post_train(dense(), recipe(steps=4), data)
    control = post_train(dense(), recipe(steps=4), twin, control=True)
    assert data.asked == twin.asked == [(step, 4) for step in range(4)]
    assert is_gated(sparse.model)
    assert not is_gated(control.model)
    assert not [name for name, _ in control.model.named_parameters() if "gate_bias" in name]
    for name in ("edges_per_query_per_head", "expected_edges", "multiplier"):
        assert {record[name] for record in control.records} == {None}
    assert control.records[0]["dense_cross_entropy"] == sparse.records[0]["dense_cross_entropy"]
    assert control.records[0]["kl"] == pytest.approx(0, abs=4e-7)  # measured 0 to 1e-7: it starts as the dense model
    assert sparse.records[0]["kl"] > 0.01


@pytest.mark.says
def test_a_text_the_dense_model_cannot_read_is_pointed_out(caplog):
    post_train(tiny_loaded("llama"), SparseAttention(steps=1, batch_size=2, context_length=12), NoiseBatches())
    assert "near chance" in caplog.text
