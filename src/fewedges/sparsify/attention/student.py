"""The model that is trained: a copy of the dense one, with gates, and with what may move set free.

What stays frozen is shared with the dense model, not copied: LoRA on a 7B model keeps one copy of its weights.
"""

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from fewedges.errors import RecipeError
from fewedges.model.anatomy import Anatomy, plain
from fewedges.model.attention import refuse_patterns
from fewedges.model.loading import Loaded
from fewedges.recipes import SparseAttention
from fewedges.sparsify.attention.interface import attach_

GATES = ("gate_bias", "gate_query")
"""How the names of gate parameters end."""


def make_student(dense: Loaded, recipe: SparseAttention, *, gates: bool = True) -> Any:
    """Copy the dense model, attach gates (unless this is the control), and free what the recipe trains."""
    _check_against(recipe, dense.anatomy)
    refuse_patterns("sparsify attention", dense.model)
    moving = _moving(dense, recipe)
    student = _copy_sharing(dense.model, frozen=[p for n, p in dense.model.named_parameters() if n not in moving])
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in moving)
        parameter.data = parameter.data.float() if name in moving else parameter.data
    if gates:
        learned = {"learned": recipe.bias == "learned", "gate_query": recipe.gate_query}
        attach_(student, dense.anatomy, bias_start=recipe.bias_start, **learned)
    return _with_adapters(student, recipe) if recipe.train == "lora" else student


def at_precision(dense: Loaded, recipe: SparseAttention) -> Loaded:
    """The dense model as teacher and frozen base of a bf16 run: cast once, not in every forward pass."""
    here = next(dense.model.parameters()).dtype == torch.bfloat16
    if recipe.precision == "fp32" or recipe.train == "full" or here:
        return dense
    model = copy.deepcopy(dense.model)
    for parameter in model.parameters():  # not the buffers: rotary frequencies would move far positions
        parameter.data = parameter.data.to(torch.bfloat16)
    return dense.with_model(model)


def trained(model: Any) -> dict[str, nn.Parameter]:
    """Everything that moves, by name: weights or adapters, and learned gate biases."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def start_from_(student: Any, model: Any) -> str:
    """Copy everything that moves from a model trained by the same kind of recipe; return the sha256 of it.

    Gate queries may be new: they start at 0, which changes nothing.
    """
    values, targets = trained(model), trained(student)
    targets = {name: p for name, p in targets.items() if name in values or not name.endswith("gate_query")}
    if odd := sorted(set(values) ^ set(targets)) or [n for n in values if values[n].shape != targets[n].shape]:
        found = f"{odd[0]} is trained in one of them only, or in another shape"
        raise RecipeError("start from a trained model", found, "its own recipe")
    digest = hashlib.sha256()
    with torch.no_grad():
        for name in sorted(values):
            targets[name].copy_(values[name])
            digest.update(name.encode() + values[name].detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def put_back_(model: Any, weights: dict[str, Tensor]) -> None:
    """Copy saved weights into what moves, in place; a name too many or too few, or another shape, is a KeyError."""
    targets = {name: parameter for name, parameter in trained(model).items() if not name.endswith(GATES)}
    both = set(targets) & set(weights)
    wrong = set(targets) ^ set(weights) | {name for name in both if targets[name].shape != weights[name].shape}
    if wrong:
        raise KeyError(sorted(wrong)[0])
    with torch.no_grad():
        for name, value in weights.items():
            targets[name].copy_(value)


def trained_weights(model: Any) -> dict[str, Tensor]:
    """What moves without the gates: what has to be saved beside the base model."""
    return {name: p.detach() for name, p in trained(model).items() if not name.endswith(GATES)}


def _moving(dense: Loaded, recipe: SparseAttention) -> set[str]:
    names = {name for name, _ in dense.model.named_parameters()}
    if recipe.train == "full":
        return names
    if recipe.train == "lora":
        return set()
    matrices = [path for layer in dense.anatomy.layers for path in (*layer.readers, *layer.writers)]
    return {name for name in names if any(name.startswith(f"{path}.") for path in matrices)}


def _copy_sharing(model: nn.Module, frozen: list[nn.Parameter]) -> Any:
    """A deep copy in which the frozen parameters are the very same tensors."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in frozen})


def _with_adapters(student: Any, recipe: SparseAttention) -> Any:
    """LoRA through peft on every linear layer but the output; gate biases stay free."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError("train=lora", "the peft package is missing", "pip install 'fewedges[peft]'") from error
    from transformers.pytorch_utils import Conv1D

    learned = [name for name in trained(student) if name.endswith(GATES)]
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_rank,
        lora_dropout=0.0,
        target_modules="all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in student.modules()),
    )
    generator_state = torch.get_rng_state()
    torch.manual_seed(recipe.seed)
    wrapped = get_peft_model(student, config)
    torch.set_rng_state(generator_state)
    parameters = dict(plain(wrapped).named_parameters())
    for name in learned:
        parameters[name].requires_grad_(True)
    for module in wrapped.modules():
        if hasattr(module, "cast_input_dtype_enabled"):  # autocast does it, without a float32 copy of the input
            module.cast_input_dtype_enabled = recipe.precision == "fp32"  # type: ignore[assignment]
    return wrapped.eval()


def _check_against(recipe: SparseAttention, anatomy: Anatomy) -> None:
    layers = len(anatomy.layers)
    for name, wanted in (("layer_weights", layers), ("layer_budgets", layers), ("head_weights", anatomy.heads)):
        given = len(getattr(recipe, name))
        if given not in (0, wanted):
            raise RecipeError(f"recipe field {name}", f"{given} numbers", f"{wanted}, one for each, or none")
    heads = layers * anatomy.heads
    if recipe.target_heads is not None and recipe.target_heads > heads:
        raise RecipeError("recipe field target_heads", f"{recipe.target_heads} of {heads} heads", "fewer, or none")
