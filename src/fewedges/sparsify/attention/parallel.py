"""Data-parallel training: several processes, one run, the same sums as one process.

`torchrun --nproc_per_node 2 -m fewedges sparsify ...` or `accelerate launch ...` start the processes; accelerate finds
them in the environment, places each on its device and carries the sums. Process r of N takes the r-th contiguous share
of every batch's windows. What a micro-batch contributes is normalised by the whole batch already (`Inputs.total`,
`Inputs.share`), and its gate noise depends on its number in the whole batch, so gradients and numbers are *summed*:
two processes give what one gives that accumulates two micro-batches of half the batch, bit for bit where the order of
the additions is the same (one micro-batch a process, two processes).

Why no DistributedDataParallel around the model: it averages instead of summing, from hooks inside the backward pass,
which neither gradient accumulation of unequal shares nor a step captured as a CUDA graph can use. One sum after
accumulation is the same algorithm; what it forgoes is communication during the backward pass. LoRA moves about 10 M
numbers a step, 40 MB. Models too large for one device are sharded, with FSDP2: sharding.py.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewedges.errors import FewedgesError, RecipeError, TrainingError
from fewedges.model.loading import Loaded
from fewedges.recipes import SparseAttention, to_dict

if TYPE_CHECKING:
    from fewedges.sparsify.attention.training import Run

BUCKET = 2**24
"""Gradients are summed in pieces of so many numbers, which bounds the memory it takes (64 MiB)."""


@dataclass(frozen=True)
class Team:
    """The processes of a run, as accelerate found them; without a launcher a team of one, which never communicates."""

    accelerator: Any

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return self.accelerator.process_index

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.accelerator.num_processes

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, windows: int) -> slice:
        """This process's rows of a batch of so many windows."""
        each = windows // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum_(self, parameters: list[Tensor], numbers: Tensor) -> Tensor:
        """Add up the gradients in place, and return the sum of `numbers`."""
        if self.size == 1:
            return numbers
        for bucket in _buckets(parameters):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            summed = self.accelerator.reduce(torch.cat([g.reshape(-1) for g in grads]), reduction="sum")
            for grad, total in zip(grads, summed.split([g.numel() for g in grads]), strict=True):
                grad.copy_(total.view_as(grad))
        return self.accelerator.reduce(numbers, reduction="sum")

    def agree_(self, run: "Run", arrived: list[int], paused: bool) -> tuple[int, bool]:
        """After a step: the signal that any process received (0: none), and whether the first one pauses.

        All go by the first one's clock, which moves the budget, and by the smallest micro-batch.
        """
        number = arrived[0] if arrived else 0
        if self.size == 1:
            return number, paused
        mine = torch.tensor([[run.seconds, number, paused, run.micro_batch]], dtype=torch.float64)
        found = self.accelerator.gather(mine.to(self.accelerator.device)).tolist()  # (N, 4)
        run.seconds, paused = found[0][0], bool(found[0][2])
        smallest = int(min(row[3] for row in found))
        if smallest < run.micro_batch:
            run.micro_batch, run.graph = smallest, None
        return int(max(row[1] for row in found)), paused

    def by_first(self, act: Callable[[], Any]) -> Any:
        """Let the first process act while the others wait; all return what it returned, or fail when it failed."""
        if self.size == 1:
            return act()
        from accelerate.utils import broadcast_object_list

        result, failed, raised = None, None, None
        if self.first:
            try:
                result = act()
            except FewedgesError as error:
                failed, raised = (error.asked, error.found, error.hint), error
        result, failed = broadcast_object_list([result, failed])
        if raised is not None:
            raise raised
        if failed is not None:
            raise TrainingError(f"the first process: {failed[0]}", *failed[1:])
        return result

    def first_then_all(self, act: Callable[[], Any]) -> Any:
        """Let the first process act before the others do: it fills a cache that they read."""
        if self.size > 1:
            self.by_first(lambda: (act(), None)[1])
        return act()

    def check_same_start(self, run: "Run") -> None:
        """Refuse to train when the processes do not begin alike: another checkpoint, other text, other weights."""
        if self.size == 1:
            return
        from accelerate.utils import gather_object

        bits = sum(int(p.detach().view(torch.int32).sum(dtype=torch.int64)) for p in run.parameters)
        mine = {"step": run.step, "recipe": to_dict(run.recipe), "data": run.data.describe(), "weights": bits}
        for rank, other in enumerate(gather_object([mine])):
            for name in mine:
                if other[name] != mine[name]:
                    found = f"process {rank} begins with {name} {other[name]}, process {self.rank} with {mine[name]}"
                    raise TrainingError(f"train in {self.size} processes", found, "one folder, recipe and text for all")


def join(model: Any, *, shard: bool = False) -> Team:
    """The team of this process; the model's place decides between CPUs (gloo) and GPUs (nccl).

    A model that will be sharded waits on the CPU and goes to the GPUs where there are any.
    """
    from accelerate import Accelerator

    wanted = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = next(model.parameters()).device.type == "cpu" and not (shard and torch.cuda.is_available())
    team = Team(Accelerator(device_placement=False, cpu=wanted > 1 and on_cpu))
    if team.size != wanted:
        found = f"{wanted} were launched, accelerate found {team.size} on {team.accelerator.device}"
        raise TrainingError("train in several processes", found, "torchrun or accelerate launch, and a fresh process")
    return team


def local_device(device: str) -> str:
    """`cuda` as this process should read it: its own GPU, where a launcher started several processes."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "cuda" and rank is not None else device


def is_first() -> bool:
    """Whether this process writes and speaks, as the launcher numbered it; before any team has met."""
    return int(os.environ.get("RANK", "0")) == 0


def leave() -> None:
    """Part after the last step: NCCL complains of a process that ends as a member of a group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def placed(dense: Loaded, team: Team) -> Loaded:
    """The model on this process's device: as it is, or a copy."""
    device = team.accelerator.device
    if team.size == 1 or next(dense.model.parameters()).device == device:
        return dense
    import copy

    return dense.with_model(copy.deepcopy(dense.model).to(device))


def micro_batch(recipe: SparseAttention, team: Team, before: int | None = None) -> int:
    """Windows per forward pass and process: what the recipe (or the run `before` its stop) had, cut to the share."""
    if recipe.batch_size % team.size:
        found = f"{recipe.batch_size} windows for {team.size} processes"
        raise RecipeError("recipe field batch_size", found, f"a multiple of {team.size}")
    wanted = recipe.micro_batch or recipe.batch_size
    return math.gcd(min(wanted, before or wanted), recipe.batch_size // team.size)


def _buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours, together at most BUCKET numbers, or one alone."""
    bucket: list[Tensor] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    yield bucket
