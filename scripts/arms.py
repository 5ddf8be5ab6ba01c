"""The arms that a ticket, RigL and SNIP are compared in, and the training they share.

A small model learns from random weights, each arm for the same optimiser steps on the same batches of the same seed:

    dense              all entries
    static             a random mask, densities by Erdos-Renyi-kernel
    rigl               the same first mask, then moved to where the gradient is large
    set                the same, moved at the same steps to anywhere
    snip               the mask of one look at the gradient before training, initial weights
    snip_shuffled      that mask shuffled inside every matrix: same density in each, so only the places differ
    ticket             iterative magnitude pruning, survivors back at their weights of step `rewind`
    shuffled           that mask shuffled inside every matrix, weights of step `rewind`
    ticket_from_0      that mask, initial weights
    reinitialised      that mask, new initial weights

tickets_addition.py and tickets_language.py say what is trained; on a GPU a step is captured once and replayed.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fewedges import store
from fewedges.model.loading import Loaded
from fewedges.sparsify.lottery import Ticket, find_ticket, reinitialised_, rewind_
from fewedges.sparsify.masks import Masks, held
from fewedges.sparsify.matrices import matrices_of
from fewedges.sparsify.pattern import dense
from fewedges.sparsify.rewiring import Rewiring, random_masks, rewired
from fewedges.sparsify.score import SCORES, Evidence
from fewedges.sparsify.select import select_global
from fewedges.weight_recipes import Rewire, Tickets

OF_TICKET = ("ticket", "shuffled", "ticket_from_0", "reinitialised")
ARMS = ("dense", "static", "rigl", "set", "snip", "snip_shuffled", *OF_TICKET)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One seed of a task."""

    seed: int
    loaded: Loaded
    """The untrained model."""
    tickets: Tickets
    rewire: Rewire
    train: Callable[..., Any]
    """train(masks, start, stop, rewire=None): train the model in place; what came of it."""
    look: Callable[[], torch.Tensor]
    """The loss that training minimises, on problems of its own: SNIP's one look."""
    keep: Path | None = None
    """Folder for the ticket once it is found, so that a later run need not look for it again."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What must be the same for a kept ticket to be taken."""


class Arm(NamedTuple):
    """A trained arm."""

    name: str
    row: dict[str, Any]
    """What `train` returned."""
    masks: Masks
    """Those it began with."""
    rounds: list[dict[str, Any]] | None = None
    """Of the ticket alone: density and row of every round, dense first."""


def trained(trial: Trial, wanted: tuple[str, ...] = ARMS) -> Iterator[Arm]:
    """Train the wanted arms, in the order of ARMS."""
    initial = _weights(trial.loaded.model)
    for name, masks, rewire in _without_ticket(trial, initial, wanted):
        if name in wanted:
            yield _arm(trial, name, masks, initial, rewire=rewire)
    if set(wanted) & set(OF_TICKET):
        yield from _with_ticket(trial, initial, wanted)


def _without_ticket(
    trial: Trial, initial: dict[str, torch.Tensor], wanted: tuple[str, ...]
) -> Iterator[tuple[str, Masks, Rewire | None]]:
    matrices, density = matrices_of(trial.loaded), trial.tickets.density
    yield "dense", Masks({name: dense(matrix.shape) for name, matrix in matrices.items()}), None
    static = random_masks(matrices, density, "erk", seed=trial.seed)
    yield "static", static, None
    yield "rigl", static, trial.rewire
    yield "set", static, replace(trial.rewire, grow="random")
    if {"snip", "snip_shuffled"} & set(wanted):
        trial.loaded.model.load_state_dict(initial)
        snip = snip_masks(trial.loaded, trial.look(), density)
        yield "snip", snip, None
        yield "snip_shuffled", snip.shuffled(trial.seed), None


def _with_ticket(trial: Trial, initial: dict[str, torch.Tensor], wanted: tuple[str, ...]) -> Iterator[Arm]:
    ticket, model = _ticket(trial, initial), trial.loaded.model
    if "ticket" in wanted:
        yield Arm("ticket", ticket.rounds[-1]["trained"], ticket.masks, ticket.rounds)
    if "shuffled" in wanted:
        yield _arm(trial, "shuffled", ticket.masks.shuffled(trial.seed), ticket.early, start=trial.tickets.rewind)
    if "ticket_from_0" in wanted:
        yield _arm(trial, "ticket_from_0", ticket.masks, initial)
    if "reinitialised" in wanted:
        reinitialised_(model, trial.seed + 100)
        yield _arm(trial, "reinitialised", ticket.masks, _weights(model))


def _arm(
    trial: Trial,
    name: str,
    masks: Masks,
    weights: dict[str, torch.Tensor],
    start: int = 0,
    rewire: Rewire | None = None,
) -> Arm:
    rewind_(trial.loaded.model, weights, masks)
    return Arm(name, trial.train(masks, start, trial.tickets.steps, rewire), masks)


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _ticket(trial: Trial, initial: dict[str, torch.Tensor]) -> Ticket:
    """The kept ticket, or a new one, kept."""
    identity = {"seed": trial.seed, "tickets": asdict(trial.tickets), **trial.identity}
    if trial.keep is not None and store.is_stored(trial.keep):
        saved = store.load(trial.keep, "ticket")
        if saved.facts["identity"] == identity:
            shapes = {name: tuple(shape) for name, shape in saved.facts["shapes"].items()}
            read = Masks.from_tensors(saved.tensors["masks"], shapes)
            masks = Masks({name: read.patterns[name] for name in shapes})  # the file's order is not ours: `shuffled`
            early = {name: value.to(initial[name].device) for name, value in saved.tensors["early"].items()}
            return Ticket(masks=masks, early=early, rounds=saved.facts["rounds"])
    trial.loaded.model.load_state_dict(initial)
    ticket = find_ticket(trial.loaded, trial.tickets, trial.train)
    if trial.keep is not None:
        shapes = {name: list(pattern.shape) for name, pattern in ticket.masks.patterns.items()}
        facts = {"identity": identity, "shapes": shapes, "rounds": ticket.rounds}
        store.save(trial.keep, "ticket", {"masks": ticket.masks.tensors(), "early": ticket.early}, facts)
    return ticket


def snip_masks(loaded: Loaded, loss: torch.Tensor, density: float) -> Masks:
    """The largest |w dL/dw| over all matrices."""
    matrices = matrices_of(loaded)
    slopes = torch.autograd.grad(loss, [matrix.parameter for matrix in matrices.values()])
    scores = {
        name: SCORES["snip"].of(matrix.weight, Evidence(gradient=matrix.oriented(slope)))
        for (name, matrix), slope in zip(matrices.items(), slopes, strict=True)
    }
    return Masks(select_global(scores, "unstructured", density))


# -- training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Course:
    """How every arm is trained: AdamW, gradients clipped to norm 1; 5 % warm-up, then a cosine to zero."""

    steps: int
    lr: float
    weight_decay: float
    look_every: int
    """Steps between two looks at the held-out data."""
    captured: bool = False
    """Replay each optimiser step as one CUDA graph: what a small model spends on a GPU is launching kernels."""

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        done = step / self.steps
        return self.lr * (min(done / 0.05, 1.0) * 0.5 * (1 + math.cos(math.pi * done)))


def train_(
    model: Any,
    masks: Masks,
    course: Course,
    start: int,
    stop: int,
    rewire: Rewire | None = None,
    *,
    batch: Callable[[int], torch.Tensor],
    loss: Callable[[Any, torch.Tensor], torch.Tensor],
    look: Callable[[], float],
) -> list[tuple[int, float]]:
    """Optimiser steps `start` to `stop` - 1 under masks (moving ones with `rewire`); steps done and what `look` saw."""
    optimizer, curve = optimizer_of(model, course), []
    model.train()
    holding = held(model, masks, optimizer) if rewire is None else rewired(model, masks, optimizer, rewire)
    with holding as holder:
        guard = holder.guard if rewire is not None else holder
        guard.kept = {name: kept.clone() for name, kept in guard.kept.items()}  # of its own: a mask is moved in place
        update = Update(model, optimizer, loss)
        step_ = Replayed(update, batch(start).to(model.device)) if course.captured else update
        for step in range(start, stop):
            set_rate_(optimizer, course.rate(step))
            if rewire is None or not moved_(holder, step, update, batch):
                step_(batch(step))
            if (step + 1) % course.look_every == 0 or step + 1 == stop:
                curve.append((step + 1, look()))
    return curve


def optimizer_of(model: Any, course: Course) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; what a CUDA graph needs (the rate on the device) where steps are captured."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": course.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if not course.captured:
        return torch.optim.AdamW(groups, lr=course.lr, betas=(0.9, 0.98))
    rate = torch.zeros((), device=model.device)
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True, capturable=True)


def set_rate_(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@dataclass(frozen=True)
class Update:
    """One optimiser step."""

    model: Any
    optimizer: torch.optim.Optimizer
    loss: Callable[[Any, torch.Tensor], torch.Tensor]

    def slopes_(self, tokens: torch.Tensor) -> None:
        """Gradients, clipped."""
        self.loss(self.model, tokens).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def __call__(self, tokens: torch.Tensor) -> None:
        self.slopes_(tokens)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Replayed:
    """An update captured once as a CUDA graph: a call copies the tokens in and replays.

    Weights, moments, masks and rate are read where they lay at capture, so they may only be changed in place.
    """

    def __init__(self, update: Update, example: torch.Tensor):
        self.tokens = example.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            warm_(update, self.tokens)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            update(self.tokens)

    def __call__(self, tokens: torch.Tensor) -> None:
        self.tokens.copy_(tokens, non_blocking=True)
        self.graph.replay()


def warm_(update: Update, tokens: torch.Tensor) -> None:
    """Three steps at rate 0 that leave no trace: kernels are chosen, the moments are allocated and are zero again."""
    set_rate_(update.optimizer, 0.0)
    for _ in range(3):
        update(tokens)
    for state in update.optimizer.state.values():
        for value in state.values():
            value.zero_()


def moved_(rigl: Rewiring, step: int, update: Update, batch: Callable[[int], torch.Tensor]) -> bool:
    """Where the mask is due to move, move it by dense gradients, in place, instead of an optimiser step."""
    rigl.prepare(step)
    if not rigl.guard.dense_gradients:
        return False
    before = rigl.guard.kept
    rigl.guard.kept = dict(before)
    update.slopes_(batch(step))
    rigl.rewire_(step)
    update.optimizer.zero_grad(set_to_none=True)
    rigl.guard.kept = {name: kept.copy_(rigl.guard.kept[name]) for name, kept in before.items()}
    return True
