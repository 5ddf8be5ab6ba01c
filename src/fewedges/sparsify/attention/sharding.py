"""Models that do not fit one device: the frozen weights in shards, one a process (FSDP2, `fully_shard` of torch).

With LoRA the dense model is the student without its adapters and its gates. So one set of shards serves both passes:
the teacher is the student itself, run dense. Each decoder layer is gathered when its turn comes and let go after it;
embeddings and norms are gathered at the start of a pass. What trains (adapters, gates) is small: every process keeps
it whole, outside of the shards, and its gradients are summed as they are without sharding (parallel.py).

Zhao et al. 2023, arXiv:2304.11277, describe FSDP. Why not through `Accelerator.prepare`: it takes one model whose
parameters train in shards, and averages their gradients.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from fewedges.errors import RecipeError
from fewedges.model.anatomy import Anatomy, plain
from fewedges.model.attention import attention_by
from fewedges.model.loading import Loaded
from fewedges.recipes import SparseAttention
from fewedges.sparsify.attention.interface import GatePass
from fewedges.sparsify.attention.parallel import Team
from fewedges.sparsify.attention.student import make_student, trained


def wants_shards(asked: bool | None) -> bool:
    """What the caller asked, or what `accelerate launch --use_fsdp` says in the environment."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" if asked is None else asked


def check_shardable(dense: Loaded, recipe: SparseAttention, team: Team) -> None:
    """Refuse what shards cannot do."""
    wrong = {
        f"train={recipe.train}": recipe.train != "lora",
        "graph=True": recipe.graph,
        "compiled=True": recipe.compiled,
        "a single process": team.size == 1,
        "a model on the GPU already": next(dense.model.parameters()).device.type != "cpu",
    }
    if found := [name for name, is_so in wrong.items() if is_so]:
        hint = "train=lora, no graph, not compiled, a model loaded on the CPU, in several processes (torchrun)"
        raise RecipeError("sharded weights", " and ".join(found), hint)


Pass = Callable[..., Any]


def shard_(student: Any, dense: Any, anatomy: Anatomy, team: Team) -> tuple[Pass, Pass]:
    """Cut the frozen weights of a LoRA student into shards on the processes' devices, layer by layer.

    Returns the teacher's forward pass and the student's, which share the shards. The dense model keeps its weights
    where they are: `fully_shard` moves the parameters that it is given, and they are the dense model's own.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device, free = team.accelerator.device, set(trained(student).values())
    for parameter in free:
        parameter.data = parameter.data.to(device)
    kept = [(p, p.data) for p in student.parameters() if p not in free]
    mesh = init_device_mesh(device.type, (team.size,))
    for module in [*_decoder_layers(student, anatomy), student]:
        fully_shard(module, mesh=mesh, ignored_params=free)
        for parameter, data in kept:
            parameter.data = data
    return _ungated(student, dense), _gated(student, anatomy)


def _ungated(student: Any, dense: Any) -> Pass:
    """The dense model as a function: the student without adapters and gates, attending as `dense` does."""

    def run(**inputs: Any) -> Any:
        with student.disable_adapter(), attention_by(plain(student), dense.config._attn_implementation):
            return student(**inputs)

    return run


def _gated(student: Any, anatomy: Anatomy) -> Pass:
    """The student as a function that hands its `gate_pass` to the attention modules alone.

    On its way through a sharded layer it would be copied: torch 2.13 rebuilds every dataclass among the arguments that
    holds tensors with gradients, and what later layers note down would go to the copy.
    """

    def run(*, gate_pass: GatePass | None = None, **inputs: Any) -> Any:
        def hand_over(_: Any, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**options, "gate_pass": gate_pass}

        with ExitStack() as stack:
            for module in anatomy.modules(student) if gate_pass is not None else []:
                stack.callback(module.register_forward_pre_hook(hand_over, with_kwargs=True).remove)
            return student(**inputs)

    return run


def whole(student: Any, dense: Loaded, recipe: SparseAttention, *, gates: bool) -> Any:
    """An ordinary student on the dense model's device with what a sharded one has learned."""
    model = make_student(dense, recipe, gates=gates)
    learned = trained(student)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(learned[name])
    return model


def _decoder_layers(student: Any, anatomy: Anatomy) -> list[Any]:
    return [plain(student).get_submodule(layer.module.rpartition(".")[0]) for layer in anatomy.layers]
