"""Two processes (gloo, CPU) equal one with the double batch. Run as a script, this file is one of the two."""

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from fewedges import store
from fewedges.errors import FewedgesError, Interrupted, StoreError
from fewedges.recipes import SparseAttention
from fewedges.sparsify.attention import training
from fewedges.sparsify.attention.parallel import join, leave, local_device
from fewedges.sparsify.attention.student import trained
from fewedges.sparsify.attention.training import post_train
from tiny import NoiseBatches, tiny_loaded

CLOCK = ("seconds", "tokens_per_second")
FULL = SparseAttention(
    steps=4, batch_size=8, micro_batch=4, context_length=12, log_every=1, warmup_steps=2, multiplier_start=0.02,
    learning_rate=1e-3, lora_rank=4, checkpoint_every=3,
)  # fmt: skip
LORA = dataclasses.replace(FULL, train="lora", precision="bf16", gate_query=True)
HALVES = dataclasses.replace(FULL, micro_batch=2, steps=1)
TWICE = dataclasses.replace(LORA, micro_batch=2)
CONTROL = dataclasses.replace(FULL, train="attention")
MINUTES = dataclasses.replace(FULL, steps=None, minutes=2.0)


class Uneven(NoiseBatches):
    """Windows that differ in how many of their tokens count: the divisor must be the whole batch's."""

    def at(self, step, size):
        batch = super().at(step, size)
        for row in range(size):
            batch.counts[row, 4 + row :] = False
        return batch


class Calling(Uneven):
    """Batches that call a function before step `step`."""

    def __init__(self, step, call):
        super().__init__()
        self.step, self.call = step, call

    def at(self, step, size):
        if step == self.step:
            self.call()
        return super().at(step, size)


@functools.cache
def dense():
    return tiny_loaded("llama")


# -- one of two processes --------------------------------------------------------------------------------------


def worker(place):
    """Run every scenario in this process, and write what came of each."""
    rank = int(os.environ["RANK"])
    outcomes, written, held = {}, [], {}
    replace = store._replace
    store._replace = lambda path, data: written.append(path.name) or replace(path, data)
    for name, scenario in scenarios(place, rank, held).items():
        seen = []
        try:
            result = scenario(seen.append)
            digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trained(result.model).values()))
            outcomes[name] = {"weights": digest.hexdigest(), "steps": [r["step"] for r in result.records]}
        except FewedgesError as error:
            outcomes[name] = {"error": type(error).__name__, "says": str(error), "code": getattr(error, "code", None)}
        outcomes[name]["seen"] = [record["step"] for record in seen]
    cache = place / "cache"
    found = join(dense().model).first_then_all(lambda: "found" if cache.exists() else cache.write_text(str(rank)))
    outcomes |= {"written": written, "held": held, "cache": found}
    (place / f"outcomes-{rank}.json").write_text(json.dumps(outcomes))
    leave()


def scenarios(place, rank, held):
    def run(name, recipe, data=None, **options):
        return lambda watch: post_train(dense(), recipe, data or Uneven(), folder=place / name, watch=watch, **options)

    def stop():
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    elsewhere = "started-alone" if rank == 0 else "nowhere"
    return {
        "full": run("full", FULL),
        "lora": run("lora", LORA),
        "control": run("control", CONTROL, control=True),
        "halves": run("halves", HALVES),
        "stopped": run("stopped", LORA, Calling(1, stop)),
        "stopped-goes-on-alone": run("stopped", LORA, Calling(2, stop)),
        "started-alone": run("started-alone", LORA),
        "strangers": run(elsewhere, LORA),
        "sharded": with_shards_counted(run("sharded", TWICE, shard=True), held),
        "unsharded": run("unsharded", TWICE),
        "sharded-control": run("sharded-control", LORA, shard=True, control=True),
        "unsharded-control": run("unsharded-control", LORA, control=True),
        "sharded-full": run("sharded-full", FULL, shard=True),
        "odd": run("odd", dataclasses.replace(FULL, batch_size=7, micro_batch=None)),
        "nan": with_bad_gradient(run("nan", dataclasses.replace(FULL, checkpoint_every=1)), rank),
        "clocks": with_clock(run("clocks", MINUTES), seconds=10.0 + 25.0 * rank),
        "memory": with_little_memory(run("memory", FULL), rank),
        "no-room": with_full_disk(run("no-room", FULL), rank),
    }


def patched(name, value, scenario):
    """The scenario, with `training.name` replaced while it runs."""

    def run(watch):
        before = getattr(training, name)
        setattr(training, name, value)
        try:
            return scenario(watch)
        finally:
            setattr(training, name, before)

    return run


def with_bad_gradient(scenario, rank):
    """In step 2 of the second process alone, one gradient is NaN."""
    forward = training._accumulate_within_memory

    def hooked(run, batch):
        sums = forward(run, batch)
        if (rank, run.step) == (1, 2):
            trained(run.student)["lm_head.weight"].grad[0, 0] = math.nan
        return sums

    return patched("_accumulate_within_memory", hooked, scenario)


def with_clock(scenario, seconds):
    """A clock that moves by so much every time it is read."""
    now = [0.0]

    def monotonic():
        now[0] += seconds
        return now[0]

    return patched("time", types.SimpleNamespace(monotonic=monotonic), scenario)


def with_little_memory(scenario, rank):
    """From step 1 on, the second process holds two windows."""
    inputs = training._inputs

    def limited(run, batch):
        for given in inputs(run, batch):
            if rank == 1 and run.step >= 1 and len(given.tokens) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            yield given

    return patched("_inputs", limited, scenario)


def with_shards_counted(scenario, held):
    """How many frozen numbers this process holds between steps, and how many there are."""
    update = training._update

    def counted(run, *rest):
        frozen = [p for p in run.student.parameters() if not p.requires_grad]
        held["mine"] = sum(p.to_local().numel() for p in frozen if hasattr(p, "to_local"))
        held["all"] = sum(p.numel() for p in frozen)
        update(run, *rest)

    return patched("_update", counted, scenario)


def with_full_disk(scenario, rank):
    def save(run):
        raise StoreError("save", "no room left", "another disk")

    return patched("save_checkpoint", save, scenario)


# -- both of them ----------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder in which two processes ran every scenario, and what they say."""
    place = tmp_path_factory.mktemp("pair")
    two_steps(place / "started-alone")
    here = Path(__file__).resolve()
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    paths = [here.parents[2], Path(store.__file__).parents[1]]
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    shared |= {"PYTHONWARNINGS": "error::UserWarning", "CUDA_VISIBLE_DEVICES": ""}  # gloo, also where there is a GPU
    processes = [
        subprocess.Popen(
            [sys.executable, str(here), str(place)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()  # the other one would wait for ever
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return place, [json.loads((place / f"outcomes-{rank}.json").read_text()) for rank in range(2)]


def two_steps(folder):
    """One process that is stopped after step 2."""
    with pytest.raises(Interrupted):
        post_train(dense(), LORA, Calling(1, lambda: signal.raise_signal(signal.SIGINT)), folder=folder)


def state(folder):
    """What a run left: tensors and facts of its checkpoint, and its log without the clock."""
    saved = store.load(folder / "checkpoint", "checkpoint")
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    facts = {name: x for name, x in saved.facts.items() if name not in ("seconds", "versions")}
    return saved.tensors, facts, without_clock(records)


def without_clock(records):
    return [{name: x for name, x in record.items() if name not in CLOCK} for record in records]


def assert_same(folder, other):
    (tensors, facts, records), (tensors2, facts2, records2) = state(folder), state(other)
    assert (facts, records) == (facts2, records2)
    for stem in ("parameters", "moments"):
        assert set(tensors[stem]) == set(tensors2[stem]) != set()
        assert [name for name, x in tensors[stem].items() if not torch.equal(x, tensors2[stem][name])] == []


@pytest.mark.matches
@pytest.mark.parametrize(("name", "recipe"), [("full", FULL), ("lora", LORA), ("control", CONTROL)])
def test_two_processes_give_the_bits_of_one_with_the_double_batch(pair, name, recipe, tmp_path):
    place, outcomes = pair
    post_train(dense(), recipe, Uneven(), folder=tmp_path, control=name == "control")
    assert_same(place / name, tmp_path)
    assert outcomes[0][name]["weights"] == outcomes[1][name]["weights"]


@pytest.mark.matches
def test_two_micro_batches_in_each_of_two_processes_equal_four_in_one(pair, tmp_path):
    """Another order of addition: equal up to float32 rounding."""
    place, _ = pair
    post_train(dense(), HALVES, Uneven(), folder=tmp_path)
    (mine, _, records), (theirs, _, records2) = state(place / "halves"), state(tmp_path)
    gradients = {name: x for name, x in theirs["moments"].items() if name.endswith("exp_avg")}
    scale = max(float(x.abs().max()) for x in gradients.values())
    worst = max(float((mine["moments"][name] - x).abs().max()) for name, x in gradients.items()) / scale
    assert worst < 4e-7  # measured 1.0e-7
    assert records[0] == pytest.approx(records2[0], rel=3e-7)  # measured 7.5e-8


@pytest.mark.reproduces
def test_a_run_goes_on_with_another_number_of_processes(pair, tmp_path):
    place, outcomes = pair
    assert_same(place / "started-alone", place / "lora")  # one process, then two
    assert outcomes[0]["started-alone"]["steps"] == [1, 2, 3, 4]
    shutil.copytree(place / "stopped", tmp_path / "stopped")
    post_train(dense(), LORA, Uneven(), folder=tmp_path / "stopped")  # two processes, then one
    assert_same(tmp_path / "stopped", place / "lora")


@pytest.mark.survives
def test_a_signal_in_one_process_saves_and_stops_both(pair):
    place, outcomes = pair
    for outcome in outcomes:
        for name, step in (("stopped", 2), ("stopped-goes-on-alone", 3)):
            assert (outcome[name]["error"], outcome[name]["code"]) == ("Interrupted", 143)
            assert f"stopped after step {step}" in outcome[name]["says"]
    assert store.load(place / "stopped" / "checkpoint").facts["step"] == 3


@pytest.mark.survives
def test_a_number_that_is_not_finite_in_one_process_stops_both_before_the_update(pair):
    place, outcomes = pair
    for outcome in outcomes:
        assert "step 2: gradient of lm_head.weight is not finite" in outcome["nan"]["says"]
    assert store.load(place / "nan" / "checkpoint").facts["step"] == 2


@pytest.mark.survives
def test_a_failed_save_stops_both(pair):
    _, outcomes = pair
    assert [outcome["no-room"]["error"] for outcome in outcomes] == ["StoreError", "TrainingError"]
    assert all("no room left" in outcome["no-room"]["says"] for outcome in outcomes)


@pytest.mark.survives
def test_processes_that_do_not_begin_alike_are_refused(pair):
    _, outcomes = pair
    assert "process 1 begins with step 0, process 0 with 4" in outcomes[0]["strangers"]["says"]
    assert "process 0 begins with step 4, process 1 with 0" in outcomes[1]["strangers"]["says"]


@pytest.mark.survives
def test_a_batch_that_cannot_be_shared_is_refused(pair):
    _, outcomes = pair
    for outcome in outcomes:
        assert outcome["odd"]["error"] == "RecipeError"
        assert "batch_size: 7 windows for 2 processes" in outcome["odd"]["says"]


@pytest.mark.survives
def test_memory_that_runs_out_in_one_process_shrinks_the_micro_batch_of_both(pair):
    place, outcomes = pair
    assert store.load(place / "memory" / "checkpoint").facts["micro_batch"] == 2
    assert outcomes[0]["memory"]["weights"] == outcomes[1]["memory"]["weights"]
    assert outcomes[0]["memory"]["steps"] == [1, 2, 3, 4]


@pytest.mark.stays
def test_both_go_by_one_clock(pair):
    _, outcomes = pair
    first, second = (outcome["clocks"] for outcome in outcomes)
    assert first["weights"] == second["weights"]
    assert first["steps"] == second["steps"] == list(range(1, len(first["steps"]) + 1))
    assert len(first["steps"]) > 3


@pytest.mark.stays
def test_only_the_first_process_writes_and_is_watched(pair):
    place, outcomes = pair
    assert outcomes[1]["written"] == []
    assert outcomes[0]["written"]
    assert (outcomes[0]["full"]["seen"], outcomes[1]["full"]["seen"]) == ([1, 2, 3, 4], [])
    assert outcomes[1]["full"]["steps"] == [1, 2, 3, 4]  # it knows the log all the same
    assert len((place / "full" / "log.jsonl").read_text().splitlines()) == 4


@pytest.mark.stays
def test_the_first_process_fills_a_cache_before_the_other_reads_it(pair):
    place, outcomes = pair
    assert (place / "cache").read_text() == "0"
    assert [outcome["cache"] for outcome in outcomes] == ["found", "found"]


@pytest.mark.matches
@pytest.mark.parametrize(
    ("cut", "uncut"),
    [("sharded", "unsharded"), ("sharded-control", "unsharded-control")],
)
def test_sharded_weights_train_to_the_same_bits(pair, cut, uncut):
    place, outcomes = pair
    assert_same(place / cut, place / uncut)
    for outcome in outcomes:
        assert outcome[cut]["weights"] == outcome[uncut]["weights"]


@pytest.mark.stays
def test_each_process_holds_its_half_of_the_frozen_weights_between_steps(pair):
    _, outcomes = pair
    whole = sum(p.numel() for p in dense().model.parameters())
    assert {outcome["held"]["all"] for outcome in outcomes} == {whole}
    assert sum(outcome["held"]["mine"] for outcome in outcomes) == whole
    assert max(outcome["held"]["mine"] for outcome in outcomes) < 0.51 * whole


@pytest.mark.survives
def test_what_shards_cannot_do_is_refused(pair):
    _, outcomes = pair
    assert "sharded weights: train=full" in outcomes[0]["sharded-full"]["says"]
    with pytest.raises(FewedgesError, match="sharded weights: a single process"):
        post_train(dense(), LORA, Uneven(), shard=True)


@pytest.mark.stays
def test_each_process_reads_cuda_as_its_own_gpu(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [local_device(name) for name in ("cuda", "cuda:0", "cpu")] == ["cuda", "cuda:0", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [local_device(name) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:3", "cuda:0", "cpu"]


if __name__ == "__main__":
    worker(Path(sys.argv[1]))  # what goes wrong in it ends the process with its error
    sys.stderr.flush()
    os._exit(0)  # twice in many runs a thread of gloo's aborted the interpreter's own end, also after leave()
