"""What pruning returns: a model with sparse weights that saves, loads, exports and knows what it lost."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewedges import store
from fewedges.errors import ModelError, StoreError
from fewedges.model.attention import refuse_patterns
from fewedges.model.loading import Loaded, fingerprint
from fewedges.model.loading import load as load_dense
from fewedges.model.probes import check as check_probes
from fewedges.recipes import from_dict, to_dict
from fewedges.sparsify.masks import Masks, watch_
from fewedges.sparsify.matrices import MERGE, Matrix, adapted, bytes_of, matrices_of, write_
from fewedges.sparsify.pattern import Dense, dense
from fewedges.sparsify.rounding import Rounded

KIND = "sparse-weights"
INSIDE = "fewedges"
"""The folder of a result inside the plain checkpoint that it is uploaded with."""


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A model with sparse or rounded weights, and all that leads back to its base."""

    loaded: Loaded
    """The model as it now is; pruning is in place, so the dense one is only on disk."""
    base: dict[str, str]
    """Name and sha256 of the dense model."""
    digests: dict[str, str] = field(repr=False)
    """sha256 of every parameter of the base: what differs from it is saved."""
    masks: Masks = field(default_factory=Masks)
    rounded: dict[str, Rounded] = field(default_factory=dict, repr=False)
    """Codes and scales of the matrices that were quantised."""
    backend: str = "plain"
    """plain, or torchao where its tensors stand in for the weights (to be run, not saved)."""
    config: dict[str, Any] = field(default_factory=dict)
    """What shrinking changed in the model's configuration."""
    stages: tuple[Any, ...] = ()
    """The recipes that made it, in order."""
    data: dict[str, Any] = field(default_factory=dict)
    """What it was calibrated on, last."""
    results: dict[str, Any] = field(default_factory=dict)
    """Measurements to be saved with it."""
    finished: bool = True
    """False: paused inside its next stage, of which a checkpoint is kept; the same call goes on."""

    def __post_init__(self) -> None:
        if self.masks.patterns:
            watch_(self.model, self.masks)

    @property
    def model(self) -> Any:
        """The transformers model, an ordinary one; a hook on it notices where zeros are lost (`masks.watch_`)."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return self.loaded.tokenizer

    def rows(self) -> list[dict[str, Any]]:
        """One row a matrix: shape, nnz, density, cover of 16, 32 and 64, FLOPs a token, bytes of what is kept or coded.

        Bytes of torchao's tensors are those of all their codes and scales, as they lie in memory: zeros count, and
        4-bit codes may lie in a byte each. None where a tensor does not say what it is made of.
        """
        return [self._row(name, matrix) for name, matrix in matrices_of(self.loaded).items()]

    def _row(self, name: str, matrix: Matrix) -> dict[str, Any]:
        pattern = self.masks.patterns.get(name) or dense(matrix.shape)
        codes = self.rounded.get(name)
        covers = {f"cover({b})": pattern.cover(b) for b in (16, 32, 64)}
        if self.backend != "plain":
            stored = bytes_of(matrix.parameter)
        elif codes is None:
            stored = pattern.bytes(matrix.parameter.dtype)
        else:
            stored = codes.bytes if isinstance(pattern, Dense) else min(codes.bytes, _sparse_codes(pattern, codes))
        known = {
            "name": name,
            "shape": matrix.shape,
            "parameters": pattern.size,
            "nnz": pattern.nnz,
            "flops": pattern.flops(1),
        }
        return {**known, "density": pattern.density, **covers, "bytes": stored}

    def check(self, after: str = "a change") -> None:
        """Raise ModelError if a masked weight is not zero, or if the weights are torchao's and cannot be read."""
        if self.backend != "plain":
            hint = "Quantize(backend='reference') to save; quantize by torchao again after loading"
            raise ModelError(f"{after}", f"its weights are {self.backend} tensors", hint)
        self.check_zeros(after)

    def check_zeros(self, after: str = "a change") -> None:
        """Raise ModelError if a masked weight is not zero, or if adapters are on, under which no one can tell."""
        if adapted(self.model):
            hint = f"{MERGE}, or unload() to drop them"
            raise ModelError(f"a sparse model after {after}", "it carries adapters (LoRA)", hint)
        self.masks.check(self.model, after)

    def __str__(self) -> str:
        made = ", then ".join(type(stage).__name__.lower() for stage in self.stages) or "untouched"
        bits = f", {next(iter(self.rounded.values())).bits} bits" if self.rounded else ""
        masked = f"; density {self.masks.density:.4f} of {self.masks.size:,} weights" if self.masks.patterns else ""
        smaller = "".join(f"; {name} {value}" for name, value in self.config.items() if isinstance(value, int))
        return f"{self.base['name']}: {made}{smaller}{masked}{bits}"

    def _repr_html_(self) -> str:
        return f"<pre>{self}</pre>"

    def save(self, folder: Path | str) -> Path:
        """Write what differs from the base: kept values, masks, codes; refused if a zero or a pattern would be lost."""
        refuse_patterns(f"save {folder}", self.model)
        self.check("work on it, before saving")
        store.save(Path(folder), KIND, _stored(self), _facts(self))
        return Path(folder)

    def export(self, folder: Path | str) -> Path:
        """Write a plain transformers checkpoint with the zeros baked in, and read it back to prove them."""
        refuse_patterns(f"export {folder}", self.model)
        self.check("work on it, before exporting")
        self.model.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        again = type(self.model).from_pretrained(folder, dtype=next(self.model.parameters()).dtype)
        self.masks.check(again, "save_pretrained")
        return Path(folder)

    def push_to_hub(self, repository: str, *, private: bool = True) -> str:
        """Upload the plain checkpoint, with this result's own folder inside; returns its address. Needs a login.

        Plain transformers loads what is uploaded; `load` of a copy of it gives this result, masks and all.
        """
        import tempfile

        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self.export(folder)
            self.save(Path(folder) / INSIDE)
            store.save(Path(folder), KIND, {}, {"inside": INSIDE})
            api = HfApi()
            api.create_repo(repository, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repository, folder_path=folder))


def begin(what: Loaded | Pruned) -> Pruned:
    """The result that changes are noted in: of a dense model, or of one already pruned."""
    if isinstance(what, Pruned):
        return what
    base = {"name": what.name, "sha256": fingerprint(what.model)}
    return Pruned(loaded=what, base=base, digests=_digests(what.model))


def after(pruned: Pruned, recipe: Any, **changes: Any) -> Pruned:
    """The result with one more stage; earlier measurements no longer hold."""
    return replace(pruned, stages=(*pruned.stages, recipe), **{"results": {}, **changes})


def load_pruned(
    folder: Path | str, *, dtype: str | torch.dtype = "float32", device: str = "cpu", probes: bool = True
) -> Pruned:
    """Load a saved result on its base; verify base, names, shapes, every mask and every zero. Raises StoreError.

    A folder written by `push_to_hub` is the result inside it.
    """
    folder = Path(folder)
    saved = store.load(folder, KIND)
    if saved.facts.get("inside") == INSIDE:
        folder = folder / INSIDE
        saved = store.load(folder, KIND)
    facts = saved.facts
    loaded = load_dense(facts["base"]["name"], dtype=dtype, device=device, probes=False)
    same = next(loaded.model.parameters()).dtype == getattr(torch, facts["dtype"])
    if same and fingerprint(loaded.model) != facts["base"]["sha256"]:
        found = f"the base {facts['base']['name']} is not the one it was made from (other weights)"
        raise StoreError(f"load {folder}", found, f"the base with sha256 {facts['base']['sha256'][:16]}...")
    digests = _digests(loaded.model) if same else {}
    if facts["config"]:
        from fewedges.sparsify.shrink import reshaped

        base, loaded = loaded.model, reshaped(loaded, facts["config"])
        _fill_alike_(loaded.model, base)
    try:
        masks, rounded = _written(loaded.model, saved.tensors, facts)
    except (KeyError, AttributeError, RuntimeError, ValueError) as error:
        raise StoreError(f"load {folder}", f"its weights do not fit the base ({error})", "a fresh copy") from error
    pruned = Pruned(
        loaded=loaded,
        base=facts["base"],
        digests=digests,
        masks=masks,
        rounded=rounded,
        config=facts["config"],
        stages=tuple(from_dict(stage) for stage in facts["stages"]),
        data=facts["data"],
        results=facts["results"],
    )
    pruned.check("loading")
    if probes:
        check_probes(loaded.model, loaded.anatomy)
    return pruned


def _stored(pruned: Pruned) -> dict[str, store.Tensors]:
    """Files and their tensors: kept values of masked matrices, codes of rounded ones, whole what else changed."""
    matrices = pruned.masks.matrices(pruned.model)
    values = {
        name: matrix.weight[pruned.masks.patterns[name].mask().to(matrix.weight.device)]
        for name, matrix in matrices.items()
        if name not in pruned.rounded
    }
    codes = {f"{n}.{part}": x for n, r in pruned.rounded.items() for part, x in r.tensors().items()}
    covered = {f"{name}.weight" for name in (*values, *pruned.rounded)}
    rest = {
        name: parameter.detach()
        for name, parameter in pruned.model.named_parameters()
        if name not in covered and pruned.digests.get(name) != _digest(parameter)
    }
    return {"masks": pruned.masks.tensors(), "values": values, "codes": codes, "weights": rest}


def _written(model: Any, tensors: dict[str, store.Tensors], facts: dict[str, Any]) -> tuple[Masks, dict[str, Rounded]]:
    """Put stored tensors into the base, in place."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in tensors["weights"].items():
            if parameters[name].shape != value.shape:
                raise ValueError(f"{name} is {tuple(value.shape)}")
            parameters[name].copy_(value)
    shapes = {name: tuple(shape) for name, shape in facts["shapes"].items()}
    masks = Masks.from_tensors(tensors["masks"], shapes, facts.get("kinds"))  # older runs say none
    for name, values in tensors["values"].items():
        mask = masks.patterns[name].mask()
        weight = torch.zeros(shapes[name], dtype=values.dtype)
        weight[mask] = values
        write_(Matrix(name, model.get_submodule(name)), weight)
    rounded = {}
    for name in facts["rounded"]:
        parts = {part: tensors["codes"][f"{name}.{part}"] for part in ("codes", "scales")}
        rounded[name] = Rounded.from_tensors(parts, shapes[name], facts["rounded"][name])  # type: ignore[arg-type]
        write_(Matrix(name, model.get_submodule(name)), rounded[name].dequantise())
    return masks, rounded


@torch.no_grad()
def _fill_alike_(small: Any, base: Any) -> None:
    """Take over every parameter that kept its shape; what differs from the base in value is in the saved files."""
    values = dict(base.named_parameters())
    for name, parameter in small.named_parameters():
        if parameter.shape == values[name].shape:
            parameter.copy_(values[name])


def _facts(pruned: Pruned) -> dict[str, Any]:
    named = (*pruned.masks.patterns, *pruned.rounded)
    facts = {
        "base": pruned.base,
        "dtype": str(next(pruned.model.parameters()).dtype).removeprefix("torch."),
        "stages": [to_dict(stage) for stage in pruned.stages],
        "shapes": {name: list(Matrix(name, pruned.model.get_submodule(name)).shape) for name in named},
        "kinds": pruned.masks.kinds(),
        "rounded": {name: rounded.bits for name, rounded in pruned.rounded.items()},
        "config": pruned.config,
        "density": pruned.masks.density,
        "data": pruned.data,
        "results": pruned.results,
        "versions": store.versions(),
    }
    return json.loads(json.dumps(facts))  # what cannot be saved fails here, before anything is written


def _sparse_codes(pattern: Any, codes: Rounded) -> int:
    """Bytes of the kept codes only, with their places, and the scales."""
    return pattern.bytes(codes.bits) + codes.scales.numel() * codes.scales.element_size()


def _digests(model: Any) -> dict[str, str]:
    return {name: _digest(parameter) for name, parameter in model.named_parameters()}


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()
