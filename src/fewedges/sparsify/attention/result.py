"""The verb `sparsify`, and what it returns: a sparse model that saves, loads, prints and shows itself."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fewedges import store
from fewedges.data.batch import Batches
from fewedges.errors import ModelError, RecipeError, StoreError
from fewedges.model.attention import refuse_patterns
from fewedges.model.loading import ASSETS, Loaded, fingerprint
from fewedges.model.loading import load as load_dense
from fewedges.model.probes import check
from fewedges.recipes import SparseAttention, from_dict, to_dict, write_recipe
from fewedges.sparsify.attention.card import model_card
from fewedges.sparsify.attention.interface import GatePass, attach_, gate_biases, gate_queries, is_gated
from fewedges.sparsify.attention.packing import pack, unpack
from fewedges.sparsify.attention.parallel import join
from fewedges.sparsify.attention.sharding import wants_shards
from fewedges.sparsify.attention.student import GATES, make_student, put_back_, trained_weights
from fewedges.sparsify.attention.training import Record, post_train

if TYPE_CHECKING:
    from fewedges.sparsify.pruned import Pruned

KIND, CONTROL = "sparse-attention", "dense-control"
SHIPPED = ("smollm2-sparse", "smollm2-few-heads")
"""Runs in the package's assets, loaded by name."""


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """A model with sparse attention, beside the dense model it came from and, if trained, its dense control."""

    loaded: Loaded
    """The sparse model; `loaded.model` runs with hard gates, `model.generate` included."""
    dense: Loaded
    control: Loaded | None = None
    recipe: SparseAttention
    records: list[Record] = field(default_factory=list)
    """The training log."""
    data: dict[str, Any] = field(default_factory=dict)
    """What it was trained on."""
    finished: bool = True
    results: dict[str, Any] = field(default_factory=dict)
    """Measurements to be saved with it (a Report as plain data)."""

    @property
    def model(self) -> Any:
        """The sparse transformers model."""
        return self.loaded.model

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return self.dense.tokenizer

    def __str__(self) -> str:
        if not self.records:
            return f"sparse {self.dense.name}, untrained"
        last = self.records[-1]
        edges = f"{last['edges_per_query_per_head']:.3g} attention edges per query per head"
        state = "" if self.finished else " (paused)"
        return f"sparse {self.dense.name}{state}: {edges}, KL {last['kl']:.3g}, after {last['tokens']:,} tokens"

    def _repr_html_(self) -> str:
        return f"<pre>{self}</pre>"

    def save(self, folder: Path | str) -> Path:
        """Write what differs from the base model (weights or adapters, gate biases), manifest, recipe, model card."""
        return save_sparse(self, Path(folder))

    def push_to_hub(self, repository: str, *, private: bool = True) -> str:
        """Upload the saved form to the Hugging Face hub; returns its address. Needs a login."""
        import tempfile

        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            api = HfApi()
            api.create_repo(repository, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repository, folder_path=folder))


def sparsify(
    model: "Loaded | Sparse",
    recipe: SparseAttention | None = None,
    *,
    data: str | Path | Batches | None = None,
    out: Path | str | None = None,
    control: bool = False,
    max_tokens: int | None = None,
    pause_minutes: float | None = None,
    watch: Callable[[Record], None] | None = None,
) -> Sparse:
    """Post-train a sparse copy of a dense model, or of a sparse one to make it sparser; `model` is left alone.

    `data` is a text file, folder or hub dataset (read with at most `max_tokens`), or any source of batches;
    "addition" needs none. With `out`, the run checkpoints there, resumes from there, and its result is saved there.
    With `control`, a dense control is trained after it: same data, same steps, no gates. Where `pause_minutes`
    ends the piece early, the result is not `finished` and the same call goes on.
    """
    recipe = SparseAttention(steps=1000) if recipe is None else recipe
    if not recipe.has_budget():
        raise RecipeError("sparsify", "the recipe has no budget", "steps=, tokens= or minutes=")
    dense, starts = origin(model, control)
    refuse_patterns("sparsify attention", dense.model, *starts.values())
    _check_format(dense, recipe)
    team = join(dense.model, shard=wants_shards(None))
    batches = team.first_then_all(lambda: training_data(dense, recipe, data, max_tokens))  # it fills the token cache
    folder = Path(out) if out is not None else None
    options: dict[str, Any] = {"pause_minutes": pause_minutes, "watch": watch}
    result = post_train(dense, recipe, batches, folder=folder, start=starts["sparse"], **options)
    sparse = Sparse(
        loaded=dense.with_model(_on_base(dense, recipe, result.model)),
        dense=dense,
        recipe=recipe,
        records=result.records,
        data=batches.describe(),
        finished=result.finished,
    )
    if control and result.finished:
        beside = folder / "control" if folder is not None else None
        twin = post_train(dense, recipe, batches, folder=beside, control=True, start=starts["control"], **options)
        sparse = _with(sparse, control=dense.with_model(_on_base(dense, recipe, twin.model)), finished=twin.finished)
    if folder is not None and team.first:
        sparse.save(folder)
    check_sparse(sparse)  # after the save: a failed check must not lose the run
    return sparse


def _check_format(dense: Loaded, recipe: SparseAttention) -> None:
    """Half precision in memory will do for a frozen base under LoRA, and nowhere else."""
    dtype = next(dense.model.parameters()).dtype
    frozen = recipe.train == "lora" and recipe.precision == "bf16" and dtype == torch.bfloat16
    if dtype.itemsize < 4 and not frozen:
        hint = "the float32 model, or train=lora and precision=bf16 on a bfloat16 one"
        raise ModelError(f"sparsify {dense.name}", f"its weights are {dtype} in memory", hint)


def origin(model: "Loaded | Sparse", control: bool) -> tuple[Loaded, dict[str, Any]]:
    """The dense model, and what the sparse copy and its control begin with where that is not the dense model."""
    if isinstance(model, Loaded):
        return model, {"sparse": None, "control": None}
    if control and model.control is None:
        found = "the run it starts from has no control, so the control would miss its steps"
        raise RecipeError("sparsify with a control", found, "a run made with control, or no control")
    return model.dense, {"sparse": model.model, "control": model.control and model.control.model}


def _on_base(dense: Loaded, recipe: SparseAttention, student: Any) -> Any:
    """The trained model on the base as it was given (a bf16 run trains on a bf16 copy), as it will be on disk."""
    weights = trained_weights(student)
    for name, value in unpack(pack(weights, recipe.saved)).items():
        weights[name].copy_(value)
    if next(student.parameters()).dtype == next(dense.model.parameters()).dtype:
        return _as_base_(student, dense)  # float32 adapters of a bfloat16 base only train under autocast
    gates = is_gated(student)
    model = make_student(dense, recipe, gates=gates)
    put_back_(model, trained_weights(student))
    if gates:
        _set_gates(model, dense, _gates(student, dense), Path("memory"))
    return model


def _gates(model: Any, dense: Loaded) -> store.Tensors:
    """The gate parameters of a gated model, layers stacked."""
    query = gate_queries(model, dense.anatomy)
    return {"bias": gate_biases(model, dense.anatomy)} | ({} if query is None else {"query": query})


def training_data(dense: Loaded, recipe: SparseAttention, data: Any, max_tokens: int | None = None) -> Batches:
    """The source of batches that `data` names."""
    if hasattr(data, "at"):
        return data
    if data is None and dense.name == "addition":
        from fewedges.data.addition import Sums

        return Sums(seed=recipe.seed)
    if data is None:
        raise RecipeError("sparsify", "no data", 'data="my_text/" (a file or folder of text), or the model "addition"')
    from fewedges.data.text import read_text

    return read_text(
        data, dense.tokenizer, context_length=recipe.context_length, seed=recipe.seed, max_tokens=max_tokens
    )


def check_sparse(sparse: Sparse) -> dict[str, float]:
    """Run the six probes on the sparse model (gates open where it is compared with plain attention)."""
    run = GatePass()
    tokens = torch.zeros((1, 4), dtype=torch.long, device=next(sparse.model.parameters()).device)
    with torch.no_grad():
        sparse.model(input_ids=tokens, gate_pass=run)
    calls = len(run.open) if is_gated(sparse.model) else 0
    return check(sparse.model, sparse.loaded.anatomy, options={"gate_pass": GatePass(open_all=True)}, calls=calls)


def save_sparse(sparse: Sparse, folder: Path) -> Path:
    """Save a Sparse as a folder; its control, if any, in `control/`."""
    refuse_patterns(f"save {folder}", *(x.model for x in (sparse.loaded, sparse.dense, sparse.control) if x))
    facts = {
        "base": {"name": sparse.dense.name, "sha256": fingerprint(sparse.dense.model)},
        "recipe": to_dict(sparse.recipe),
        "data": sparse.data,
        "finished": sparse.finished,
        "seed": sparse.recipe.seed,
        "versions": store.versions(),
        "results": sparse.results,
        "last_record": sparse.records[-1] if sparse.records else None,
    }
    gates = _gates(sparse.model, sparse.loaded)
    store.save(
        folder, KIND, {"weights": pack(trained_weights(sparse.model), sparse.recipe.saved), "gates": gates}, facts
    )
    store.write_text(folder / "README.md", model_card(facts))
    store.write_text(folder / "log.jsonl", "".join(json.dumps(record) + "\n" for record in sparse.records))
    write_recipe(sparse.recipe, folder / "recipe.yaml")
    if sparse.control is not None:
        save_control(folder / "control", sparse.dense, sparse.recipe, sparse.data, sparse.control.model)
    return folder


def save_control(folder: Path, dense: Loaded, recipe: SparseAttention, data: dict[str, Any], model: Any) -> None:
    """Save a dense control: what moved, and what it was made of."""
    refuse_patterns(f"save {folder}", model)
    base = {"name": dense.name, "sha256": fingerprint(dense.model)}
    facts = {"base": base, "recipe": to_dict(recipe), "data": data}
    store.save(folder, CONTROL, {"weights": pack(trained_weights(model), recipe.saved)}, facts)


def load_sparse(
    folder: Path | str, *, dtype: str | torch.dtype = "float32", device: str = "cpu", probes: bool = True
) -> Sparse:
    """Load a saved Sparse with its dense base, verify both, and run the probes."""
    folder = Path(folder)
    saved = store.load(folder, KIND)
    recipe = from_dict(saved.facts["recipe"])
    base = saved.facts["base"]
    dense = load_dense(base["name"], dtype=dtype, device=device, probes=False)
    if next(dense.model.parameters()).dtype == torch.float32 and fingerprint(dense.model) != base["sha256"]:
        found = f"the base model {base['name']} is not the one it was trained from (other weights)"
        raise StoreError(f"load {folder}", found, f"the base with sha256 {base['sha256'][:16]}...")
    student = make_student(dense, recipe)
    _put_back(student, saved.tensors["weights"], folder)
    _set_gates(student, dense, saved.tensors["gates"], folder)
    control = None
    if store.is_stored(folder / "control"):
        twin = make_student(dense, recipe, gates=False)
        _put_back(twin, store.load(folder / "control", CONTROL).tensors["weights"], folder / "control")
        control = dense.with_model(_as_base_(twin, dense))
    facts = {
        "data": saved.facts["data"],
        "finished": saved.facts["finished"],
        "results": saved.facts["results"],
    }
    sparse = Sparse(
        loaded=dense.with_model(_as_base_(student, dense)),
        dense=dense,
        control=control,
        recipe=recipe,
        records=_log(folder),
        **facts,
    )
    if probes:
        check_sparse(sparse)
    return sparse


def load(
    name: Path | str,
    *,
    gate_bias: float | None = None,
    dtype: str | torch.dtype = "float32",
    device: str = "cpu",
    probes: bool = True,
) -> "Sparse | Loaded | Pruned":
    """Load a saved run (attention, weights, pixelated) or a dense model (hub id, folder, .gguf, built-in).

    `smollm2-sparse` (the fewest edges) and `smollm2-few-heads` (the smallest circuits) are runs that come with the
    package; their base comes with `fewedges get smollm2`.
    With `gate_bias`, the weights of a dense checkpoint are run through constant gates `score + gate_bias > 0`.
    """
    name = ASSETS / name if name in SHIPPED else name
    if store.is_stored(name) and gate_bias is not None:
        found = "it is a sparse run and has gate biases of its own"
        raise RecipeError(f"load {name} with gate_bias={gate_bias}", found, "no gate_bias, or a dense checkpoint")
    if store.is_stored(name):
        from fewedges.sparsify import pixelate, pixelated, pruned

        kinds = {pruned.KIND: pruned.load_pruned, pixelate.KIND: pixelated.load_pixelated}
        read = kinds.get(store.read_manifest(Path(name))["kind"], load_sparse)
        return read(name, dtype=dtype, device=device, probes=probes)
    dense = load_dense(name, dtype=dtype, device=device, probes=probes)
    return dense if gate_bias is None else gates_only(dense, gate_bias)


def gates_only(dense: Loaded, bias: float) -> Sparse:
    """A model whose weights were trained for gates elsewhere: attach constant gates `score + bias > 0`.

    This is how a published checkpoint with gates `score > 0` (bias 0) is measured.
    """
    recipe = SparseAttention(bias="constant", bias_start=bias, steps=1)
    student = attach_(make_student(dense, recipe, gates=False), dense.anatomy, bias_start=bias, learned=False)
    return Sparse(loaded=dense.with_model(student), dense=dense, recipe=recipe)


def _put_back(student: Any, weights: store.Tensors, folder: Path) -> None:
    try:
        put_back_(student, unpack(weights))
    except KeyError as error:
        raise StoreError(
            f"load {folder}", f"its weights do not fit the recipe, first {error}", "train again"
        ) from error


def _set_gates(student: Any, dense: Loaded, gates: store.Tensors, folder: Path) -> None:
    wanted = {name: tuple(x.shape) for name, x in _gates(student, dense).items()}
    found = {name: tuple(x.shape) for name, x in gates.items()}
    if found != wanted:
        raise StoreError(f"load {folder}", f"gates {found}, base and recipe have {wanted}", "another base")
    with torch.no_grad():
        for name, values in gates.items():
            for module, value in zip(dense.anatomy.modules(student), values, strict=True):
                getattr(module, f"gate_{name}").copy_(value)


def _as_base_(model: Any, dense: Loaded) -> Any:
    """The number format of the base for all but the gates: a layer in half precision refuses float32 input."""
    dtype = next(dense.model.parameters()).dtype
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if name.endswith(GATES) else parameter.data.to(dtype)
    return model


def _log(folder: Path) -> list[Record]:
    path = folder / "log.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    except (ValueError, OSError) as error:
        raise StoreError(f"load {folder}", f"log.jsonl cannot be read ({error})", "delete log.jsonl") from error


def _with(sparse: Sparse, **changes: Any) -> Sparse:
    import dataclasses

    return dataclasses.replace(sparse, **changes)
