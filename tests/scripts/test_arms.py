"""The arms that tickets, RigL and SNIP are compared in: what each begins with, and steps replayed as captured."""

import json
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fewedges.sparsify.matrices import matrices_of
from fewedges.weight_recipes import Rewire, Tickets
from tiny import NoiseBatches, tiny_loaded

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
STEPS, REWIND = 12, 2
NOISE = NoiseBatches()


@pytest.fixture
def arms(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import arms

    return arms


@pytest.fixture
def language(arms):
    import tickets_language

    return tickets_language


def tiny():
    """A tiny GPT-2 that trains without dropout: two runs see the same."""
    loaded = tiny_loaded("gpt2")
    for module in loaded.model.requires_grad_(True).modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return loaded


def loss_of(model, tokens):
    return model(input_ids=tokens, labels=tokens).loss


def course(arms, captured=False):
    return arms.Course(steps=STEPS, lr=1e-2, weight_decay=0.1, look_every=4, captured=captured)


def trial(arms, log, keep=None, captured=False):
    """A tiny GPT-2 on noise; `log` gets masks and weights that every training begins with."""
    loaded = tiny()
    model = loaded.model

    def train(masks, start, stop, rewire=None):
        log.append((masks, start, {name: p.detach().clone() for name, p in model.named_parameters()}))
        if stop == start:
            return None
        what = {"batch": lambda step: NOISE.at(step, 2).tokens, "loss": loss_of}
        what["look"] = lambda: float(loss_of(model, NOISE.at(99, 4).tokens).detach())
        curve = arms.train_(model, masks, course(arms, captured), start, stop, rewire, **what)
        return {"loss": curve[-1][1], "curve": [list(point) for point in curve]}

    tickets = Tickets(rounds=2, rate=0.4, rewind=REWIND, steps=STEPS)
    rewire = Rewire(density=tickets.density, every=3, steps=STEPS)
    look = lambda: loss_of(model, NOISE.at(77, 4).tokens)  # noqa: E731
    return arms.Trial(seed=5, loaded=loaded, tickets=tickets, rewire=rewire, train=train, look=look, keep=keep)


def masks_of(masks):
    return {name: pattern.mask().cpu() for name, pattern in masks.patterns.items()}


def same_masks(a, b):
    return all(torch.equal(x, masks_of(b)[name]) for name, x in masks_of(a).items())


@pytest.mark.matches
def test_each_arm_begins_with_its_masks_and_weights(arms):
    log = []
    todo = trial(arms, log)
    initial = {name: p.detach().clone() for name, p in todo.loaded.model.named_parameters()}
    found = {arm.name: (arm, log[-1]) for arm in arms.trained(todo)}
    assert tuple(found) == arms.ARMS
    begun = {name: weights for name, (_, (_, _, weights)) in found.items()}
    starts = {name: start for name, (_, (_, start, _)) in found.items()}
    assert starts == {**dict.fromkeys(arms.ARMS, 0), "ticket": REWIND, "shuffled": REWIND}
    matrices = matrices_of(todo.loaded)
    ticket, early = found["ticket"][0].masks, log[7][2]  # the first of the ticket's trainings from step REWIND
    for name in ("dense", "static", "rigl", "set", "snip", "snip_shuffled"):
        check_begun(begun[name], initial, found[name][0].masks, matrices)
    check_begun(begun["ticket"], early, ticket, matrices)
    check_begun(begun["ticket_from_0"], initial, ticket, matrices)
    check_begun(begun["shuffled"], early, found["shuffled"][0].masks, matrices)
    assert all(same_masks(found["static"][0].masks, found[name][0].masks) for name in ("rigl", "set"))
    assert same_masks(found["reinitialised"][0].masks, ticket)
    table = "transformer.wte.weight"
    assert not torch.equal(begun["reinitialised"][table], initial[table])
    alone = next(arms.trained(trial(arms, []), ("snip",)))
    assert same_masks(found["snip"][0].masks, alone.masks)  # judged at the initial weights, whatever ran before
    for control, of in {"snip_shuffled": "snip", "shuffled": "ticket"}.items():
        mine, theirs = found[control][0].masks.patterns, found[of][0].masks.patterns
        assert {n: p.nnz for n, p in mine.items()} == {n: p.nnz for n, p in theirs.items()}
        assert not same_masks(found[control][0].masks, found[of][0].masks)
    assert [round(row["density"], 2) for row in found["ticket"][0].rounds] == [1.0, 0.6, 0.36]
    assert all(abs(arm.masks.density - 0.36) < 3e-3 for name, (arm, _) in found.items() if name != "dense")


def check_begun(begun, weights, masks, matrices):
    """The weights a training began with are these, zero where masked."""
    for name, value in weights.items():
        matrix = name.removesuffix(".weight")
        if matrix in matrices:
            value = torch.where(matrices[matrix].oriented(masks_of(masks)[matrix]), value, 0)
        assert torch.equal(begun[name], value), name


@pytest.mark.reproduces
def test_a_kept_ticket_gives_the_arms_that_a_new_one_gives(arms, tmp_path):
    whole, first, second = [], [], []
    wanted = {arm.name: arm.row for arm in arms.trained(trial(arms, whole), arms.OF_TICKET)}
    begun = {arm.name: arm.row for arm in arms.trained(trial(arms, first, tmp_path / "t"), ("ticket",))}
    begun |= {a.name: a.row for a in arms.trained(trial(arms, second, tmp_path / "t"), arms.OF_TICKET)}
    assert begun == wanted
    assert (len(whole), len(first), len(second)) == (7, 4, 3)
    third = []
    other = trial(arms, third, tmp_path / "t")
    other.identity["text"] = "another"
    list(arms.trained(other, ("ticket",)))
    assert len(third) == 4  # another protocol's ticket is not taken


# -- replayed steps ------------------------------------------------------------------------------------------------


class Tape(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: the operations of a piece of code, repeated on the very same memory."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.before += [(x, x.clone()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        found = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, found))
        return found

    @torch.no_grad()
    def undo(self):
        """As if nothing had run: capturing only notes what is to be done."""
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    @torch.no_grad()
    def replay(self):
        for operation, args, kwargs, found in self.calls:
            for old, new in zip(tree_leaves(found), tree_leaves(operation(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def taped(monkeypatch):
    """torch.cuda's graphs, played by a Tape."""

    @contextmanager
    def graph(tape):
        with tape:
            yield
        tape.undo()

    stream = SimpleNamespace(wait_stream=lambda _: None)
    parts = {"Stream": lambda: stream, "current_stream": lambda: stream, "CUDAGraph": Tape, "graph": graph}
    for name, part in {**parts, "stream": lambda _: nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, part)


def outcome(arms, name):
    todo = trial(arms, [], captured=True)
    row = next(arms.trained(todo, (name,))).row
    return row, {n: p.detach().clone() for n, p in todo.loaded.model.named_parameters()}


@pytest.mark.matches
@pytest.mark.parametrize("name", ["static", "rigl", "set"])
def test_a_replayed_step_is_the_eager_one(arms, taped, monkeypatch, name):
    calls, replay = [], Tape.replay
    monkeypatch.setattr(Tape, "replay", lambda self: (calls.append(1), replay(self)))
    row, weights = outcome(arms, name)
    assert len(calls) == (STEPS if name == "static" else STEPS - 2)  # the mask moves at steps 3 and 6
    monkeypatch.setattr(arms, "Replayed", lambda update, _: update)
    wanted, same = outcome(arms, name)
    assert row == wanted
    assert all(torch.equal(value, same[key]) for key, value in weights.items())


@pytest.mark.stays
def test_warming_up_leaves_no_trace(arms):
    model = tiny().model
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = arms.optimizer_of(model, course(arms, captured=True))
    arms.warm_(arms.Update(model, optimizer, loss_of), NOISE.at(0, 2).tokens)
    assert len(optimizer.state) == len(before)
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


# -- the language model --------------------------------------------------------------------------------------------


@pytest.mark.reproduces
def test_rows_come_as_arms_do_and_none_is_made_twice(language, monkeypatch, tmp_path, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tickets_language.py", *map(str, words)])
        language.main()

    text = "The quick brown fox.\n<|endoftext|>\nIt jumps over the lazy dog; ü.\n" * 60
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    given = ["--dry", "--seeds", 0, "--text", tmp_path / "text.txt", "--valid", tmp_path / "text.txt"]
    part, whole = tmp_path / "part.jsonl", tmp_path / "whole.jsonl"
    run(*given, "--out", part, "--arms", "dense", "ticket")
    assert (tmp_path / "part-ticket-0").exists()
    part.write_text(part.read_text() + json.dumps({"seed": 0, "arm": "snip"})[:-3])  # cut off
    run(*given, "--out", part)
    run(*given, "--out", whole)
    assert not list(tmp_path.glob("*-ticket-0"))
    rows, same = ({row["arm"]: row for row in language.rows_in(path)} for path in (whole, part))
    assert (list(rows), list(same)[:3]) == (list(language.ARMS), ["dense", "ticket", "static"])
    assert len(language.rows_in(part)) == len(rows)
    assert {name: row["curve"] for name, row in rows.items()} == {name: row["curve"] for name, row in same.items()}
    capsys.readouterr()
    run("--table", whole)
    assert f"| ticket | 0.6402 | {rows['ticket']['cross_entropy']:.4f} (" in capsys.readouterr().out
    settings = rows["snip"]["protocol"]["settings"] | {"lr": 1.0}
    part.write_text(
        json.dumps(rows["snip"] | {"seed": 1, "protocol": rows["snip"]["protocol"] | {"settings": settings}})
    )
    with pytest.raises(SystemExit, match="another protocol"):
        run("--table", whole, part)


@pytest.mark.matches
def test_bytes_and_what_stands_between_documents(language, tmp_path):
    (tmp_path / "t.txt").write_text("ab\n<|endoftext|>\nü\n<|endoftext|>\nc", encoding="utf-8")
    assert language.read_bytes(tmp_path / "t.txt", 1000).tolist() == [97, 98, 256, 0xC3, 0xBC, 256, 99]
    assert language.read_bytes(tmp_path / "t.txt", 2).tolist() == [97, 98]
